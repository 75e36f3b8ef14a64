//! Rules that rename or refuse extended attributes (`--xattrmap`).
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ffi::CStr;

/// An ordered list of rules. The default passes every name through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XattrMap {}

/// What becomes of a name the DPU uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost<'a> {
    /// Use this name on the host.
    Name(Cow<'a, CStr>),
    /// Refuse with `EPERM`.
    Denied,
    /// Refuse with `EOPNOTSUPP`.
    Unsupported,
}

impl XattrMap {
    /// The host name for a name the DPU gave.
    pub fn to_host<'a>(&self, dpu_name: &'a CStr) -> ToHost<'a> {
        ToHost::Name(Cow::Borrowed(dpu_name))
    }

    /// The name the DPU sees for a host name in a listing; `None` hides it.
    pub fn to_dpu<'a>(&self, host_name: &'a CStr) -> Option<Cow<'a, CStr>> {
        Some(Cow::Borrowed(host_name))
    }
}
