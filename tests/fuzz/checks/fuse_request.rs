//! One input is one request: a byte that picks what was negotiated, two for the room of the reply,
//! then header and body as the DPU would send them.

use std::ffi::CStr;

use backend_fs::fuse::abi::{InHeader, WriteIn};
use backend_fs::fuse::arguments::{MAX_LISTING, XATTR_SIZE_MAX};
use backend_fs::fuse::extension::Accepted;
use backend_fs::fuse::opcode::Opcode;
use backend_fs::fuse::request::{Message, Request, parse};
use backend_fs::fuse::session::Layout;
use zerocopy::FromBytes;

/// Parses, and checks what an accepted request promises to the file system. Gives
/// whether it was accepted.
pub fn check(data: &[u8]) -> bool {
    let Some(([options, low, high], request)) = data.split_first_chunk() else { return false };
    let Ok((header, body)) = InHeader::read_from_prefix(request) else { return false };
    let Some(opcode) = Opcode::from_wire(header.opcode) else { return false };
    let bit = |bit: u8| options & (1 << bit) != 0;
    let layout = Layout {
        setxattr_ext: bit(0),
        extensions: Accepted { groups: bit(1), label: bit(2) },
        uncounted_label: bit(3),
    };
    let room = usize::from(u16::from_le_bytes([*low, *high]));
    let message = Message { header, body, body_len: body.len(), room };
    let Ok((request, extensions)) = parse(opcode, &message, layout) else { return false };
    assert!(request.least_reply() <= 320);
    assert!(extensions.groups.is_none_or(|groups| bit(1) && !groups.ids().contains(&u32::MAX)));
    assert!(extensions.label.is_none_or(|(name, _)| bit(2) && (1..=255).contains(&name.count_bytes())));
    promises(&request, &message);
    true
}

/// Every field that could do harm, by request.
fn promises(request: &Request, message: &Message) {
    match request {
        Request::Lookup { name }
        | Request::Symlink { name, .. }
        | Request::Mknod { name, .. }
        | Request::Mkdir { name, .. }
        | Request::Unlink { name }
        | Request::Rmdir { name }
        | Request::Link { name, .. }
        | Request::Create { name, .. } => component(name),
        Request::Rename { from, to, .. } => {
            component(from);
            component(to.1);
        }
        Request::Read { size, offset, .. } => {
            assert!(*size <= message.room && reaches(*offset, *size as u64));
        }
        Request::Readdir { size, .. } | Request::Readdirplus { size, .. } => {
            assert!(*size <= message.room && *size <= MAX_LISTING as usize);
        }
        Request::Write { size, offset, .. } => {
            assert!(size + size_of::<WriteIn>() == message.body_len && reaches(*offset, *size as u64));
        }
        Request::Getxattr { size, .. } | Request::Listxattr { size } => {
            assert!(*size <= XATTR_SIZE_MAX && *size as usize <= message.room);
        }
        Request::Setxattr { value, .. } => assert!(value.len() <= XATTR_SIZE_MAX as usize),
        Request::Fallocate { offset, len, .. } => assert!(reaches(*offset, *len)),
        Request::CopyFileRange { range, .. } => {
            assert!(reaches(range.source.2, range.len) && reaches(range.target.2, range.len));
        }
        Request::Getlk(lock) | Request::Setlk { lock, .. } => assert!(lock.lock.start <= lock.lock.end),
        Request::Setattr(change) => {
            assert!(change.uid != Some(u32::MAX) && change.gid != Some(u32::MAX));
        }
        Request::BatchForget(forgets) => assert!(forgets.iter().count() * 16 <= message.body_len),
        _ => {}
    }
}

fn component(name: &CStr) {
    let name = name.to_bytes();
    assert!((1..=255).contains(&name.len()) && name != b"." && name != b".." && !name.contains(&b'/'));
}

/// Whether a range ends at the largest offset at the latest.
fn reaches(offset: u64, len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64)
}
