//! Strings of the protocol: the one place where names that the DPU sends are checked.
//!
//! The check holds in every sandbox mode; no layer below relies on a sandbox to catch a name that
//! leaves the export. A name is one component: not empty, not `.` or `..`, without `/` and without
//! inner NUL, with its final NUL, at most 255 bytes.
#![forbid(unsafe_code)]

use std::ffi::CStr;

use rustix::io::Errno;

/// Longest name of a directory entry, in bytes without the NUL (`NAME_MAX`, `linux/limits.h`).
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes without the NUL (`PATH_MAX - 1`, `linux/limits.h`).
pub const TARGET_MAX: usize = 4095;
/// Longest name of an extended attribute, in bytes without the NUL (`XATTR_NAME_MAX`).
pub const XATTR_NAME_MAX: usize = 255;

/// Splits off the string up to and including the first NUL.
///
/// # Errors
/// `EINVAL` when there is no NUL.
#[inline]
pub fn split_string(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let string = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    Ok((string, &bytes[string.count_bytes() + 1..]))
}

/// Checks the name of a directory entry.
///
/// # Errors
/// `EINVAL` for a name that is no single component, `ENAMETOOLONG` above [`NAME_MAX`].
#[inline]
pub fn check_component(name: &CStr) -> Result<&CStr, Errno> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(name),
    }
}

/// Checks the target of a symbolic link. It may be any path: it is stored, never followed here.
///
/// # Errors
/// `EINVAL` for an empty target, `ENAMETOOLONG` above [`TARGET_MAX`].
pub fn check_target(target: &CStr) -> Result<&CStr, Errno> {
    match target.count_bytes() {
        0 => Err(Errno::INVAL),
        len if len > TARGET_MAX => Err(Errno::NAMETOOLONG),
        _ => Ok(target),
    }
}

/// Checks the name of an extended attribute. A `/` is as good as any other byte there.
///
/// # Errors
/// `EINVAL` for an empty name, `ENAMETOOLONG` above [`XATTR_NAME_MAX`].
pub fn check_xattr_name(name: &CStr) -> Result<&CStr, Errno> {
    match name.count_bytes() {
        0 => Err(Errno::INVAL),
        len if len > XATTR_NAME_MAX => Err(Errno::NAMETOOLONG),
        _ => Ok(name),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    fn check(name: &[u8]) -> Result<(), Errno> {
        check_component(&CString::new(name).unwrap()).map(|_| ())
    }

    #[test]
    fn a_component_that_leaves_its_directory_is_refused() {
        for name in [&b""[..], b".", b"..", b"/", b"/etc", b"a/b", b"../x", b"a/"] {
            assert_eq!(check(name), Err(Errno::INVAL), "{name:?}");
        }
    }

    #[test]
    fn dots_inside_a_component_and_any_other_byte_are_fine() {
        for name in [&b"..."[..], b".a", b"..a", b"a..", b"\xff\xfe", b" ", b"\n"] {
            assert_eq!(check(name), Ok(()), "{name:?}");
        }
    }

    #[test]
    fn lengths_end_at_the_limit() {
        assert_eq!(check(&[b'a'; NAME_MAX]), Ok(()));
        assert_eq!(check(&[b'a'; NAME_MAX + 1]), Err(Errno::NAMETOOLONG));
        let long = CString::new(vec![b'a'; TARGET_MAX]).unwrap();
        assert!(check_target(&long).is_ok());
        let longer = CString::new(vec![b'a'; TARGET_MAX + 1]).unwrap();
        assert_eq!(check_target(&longer), Err(Errno::NAMETOOLONG));
        assert_eq!(check_target(c""), Err(Errno::INVAL));
        assert!(check_xattr_name(c"user.with/slash").is_ok());
        assert_eq!(check_xattr_name(c""), Err(Errno::INVAL));
        let long = CString::new(vec![b'a'; XATTR_NAME_MAX + 1]).unwrap();
        assert_eq!(check_xattr_name(&long), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn a_string_ends_at_its_first_nul_and_must_have_one() {
        assert_eq!(split_string(b"ab\0c\0"), Ok((c"ab", &b"c\0"[..])));
        assert_eq!(split_string(b"\0"), Ok((c"", &b""[..])));
        assert_eq!(split_string(b"ab"), Err(Errno::INVAL));
        assert_eq!(split_string(b""), Err(Errno::INVAL));
    }
}
