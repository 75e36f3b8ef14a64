//! One input is one message: a byte for the number of descriptors, the header, the payload.

use vring::message::{HEADER_SIZE, Header, MAX_MEM_SLOTS, MAX_PAYLOAD, PayloadBuffer, Request};

/// Parses header and payload, and checks what an accepted one promises to the session. Gives
/// whether it was accepted.
pub fn check(data: &[u8]) -> bool {
    let Some((&fds, message)) = data.split_first() else { return false };
    let Some((header, payload)) = message.split_first_chunk::<HEADER_SIZE>() else { return false };
    let Ok(header) = Header::parse(header) else { return false };
    assert!(header.size <= MAX_PAYLOAD);
    assert_eq!(Header::parse(&header.encode()), Ok(header));
    let len = payload.len().min(header.size);
    let mut buffer = Box::new(PayloadBuffer([0; MAX_PAYLOAD]));
    buffer.0[..len].copy_from_slice(&payload[..len]);
    let request = Request::parse(header.request, &buffer.0[..len], usize::from(fds));
    match &request {
        Ok(Request::SetMemTable(regions)) => {
            assert!(regions.len() <= MAX_MEM_SLOTS && regions.len() == usize::from(fds));
        }
        Ok(Request::SetConfig(range, data)) => assert_eq!(range.size as usize, data.len()),
        Ok(_) | Err(_) => {}
    }
    request.is_ok()
}
