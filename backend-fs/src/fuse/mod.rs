//! The FUSE protocol as the stock virtio-fs driver speaks it (Linux 5.4 to 6.18 and later).
//!
//! Bytes in a descriptor chain come in, one call of [`crate::filesystem::FileSystem`] is made, bytes
//! go out. Nothing here knows rings, files or options beyond what `FUSE_INIT` offers.
//!
//! | module | job |
//! |---|---|
//! | [`dispatch`] | chain to file system to reply; what may block |
//! | [`session`] | what was negotiated, shared by all threads that serve |
//! | [`request`], [`arguments`] | bytes to [`request::Request`], every field checked; pure |
//! | [`name`] | the one place where names are checked; pure |
//! | [`extension`] | supplementary groups and labels at the end of a request; pure |
//! | [`init`], [`init_flags`] | version and feature negotiation; pure |
//! | [`reply`], [`dirent`] | values to bytes; pure |
//! | [`abi`], [`opcode`] | wire structures, constants, operation codes |
//! | [`counters`] | what was served and refused |
//!
//! # The protocol on virtio-fs
//!
//! A request is `fuse_in_header`, arguments, payload in the readable descriptors; its reply is
//! `fuse_out_header` and a body in the writable ones. Requests are answered in any order. There is
//! no channel from host to DPU: Linux has no notification queue for virtio-fs and never sends
//! `FUSE_INTERRUPT`, so nothing can be invalidated, woken or cancelled.
//!
//! Linux since 7.1 fails a request with `EIO` unless the used length, the length in the reply's
//! header and its `unique` are right (`virtio_fs_verify_response`); older ones believe anything.
//!
//! **Versions.** Major 7, minor 23 to 45 (Linux 6.18); a newer kernel is answered with 45. What
//! depends on the version or on flags in the wire format is in [`session::Layout`]: the length of
//! the arguments of `FUSE_SETXATTR`, and where the label of a new inode is (5.17 to 6.2 do not count
//! it in the header).
//!
//! **Sizes.** `max_write` is 1 MiB, in 256 pages of 4 KiB. Linux lowers that to its queue size
//! less 4: QEMU's default of 128 descriptors makes requests of 496 KiB, a queue of 1024 makes full
//! ones. A kernel with pages of 64 KiB writes at most 1 MiB too but may read 16 MiB at once, and
//! takes a short reply for the end of the file: `READ` is limited by the room for its reply alone.
//!
//! # What is refused
//!
//! | request | answer | what Linux makes of it |
//! |---|---|---|
//! | `IOCTL` | `ENOSYS` | `ENOTTY` for the program |
//! | `POLL` | `ENOSYS` | always ready, as a regular file is; never asks again |
//! | `BMAP` | `ENOSYS` | 0, never asks again |
//! | `SETUPMAPPING`, `REMOVEMAPPING` | `ENOSYS` | sent only with a DAX window, which is not offered |
//! | `NOTIFY_REPLY` | `ENOSYS` if there is room | never sent: it answers a notification |
//! | an operation not known | `ENOSYS` | as above, by operation |
//! | `INTERRUPT`, `FORGET`, `BATCH_FORGET` | none, used length 0 | expects none |
//! | anything but `INIT` before it, or after `DESTROY` | `EIO` | does not happen |
//! | a field that breaks its rule ([`request`]) | `EINVAL`, `ENAMETOOLONG` and the like | does not happen |
//! | less room for the reply than the answer needs | `EINVAL`, no effect | does not happen |
//! | less room than a reply header, or less request than a header | none, used length 0, counted | `EIO` since 7.1 |
//!
//! `ENOSYS` is an answer Linux remembers per mount. From `FSYNC` it would mean "nothing to do, for
//! ever", so it is never passed on there.
//!
//! # The path of a READ
//!
//! 1. [`dispatch::serve`] copies 80 bytes, header and `fuse_read_in`, out of the chain.
//! 2. [`request::parse`] checks the offset and cuts the size to the room behind the reply header.
//! 3. The chain gives the writable bytes from 16 on as slices; the file system reads into them.
//! 4. The header is put in front of the data; the used length is 16 plus the bytes read.
//!
//! One copy of 80 bytes in, one of 16 bytes out, no allocation, no lock, one atomic load.

pub mod abi;
pub mod arguments;
pub mod counters;
pub mod dirent;
pub mod dispatch;
pub mod extension;
pub mod init;
pub mod init_flags;
pub mod name;
pub mod opcode;
pub mod reply;
pub mod request;
pub mod session;

pub use dispatch::{Blocked, Scratch, Served, refuse, serve};
pub use session::Session;
