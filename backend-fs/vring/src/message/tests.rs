//! Wire format: layouts that QEMU and the `vhost` crate use, and every malformed form.

use proptest::prelude::*;

use super::*;

fn parse_at(request: u32, payload: &[u8], fds: usize) -> Result<Request<'static>, RequestError> {
    // A leaked aligned copy keeps the tests free of lifetimes; it is a few bytes per case.
    let buffer = Box::leak(Box::new(PayloadBuffer([0; MAX_PAYLOAD])));
    buffer.0[..payload.len()].copy_from_slice(payload);
    Request::parse(request, &buffer.0[..payload.len()], fds)
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

#[test]
fn header_layout_is_request_flags_size() {
    let header = Header { request: 5, need_reply: true, size: 40 };
    assert_eq!(header.encode(), [5, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0]);
    assert_eq!(Header::parse(&header.encode()), Ok(header));
}

#[test]
fn header_of_another_version_reply_or_oversize_ends_the_stream() {
    let raw = |flags: u32, size: u32| -> [u8; 12] { zerocopy::transmute!([7u32, flags, size]) };
    assert_eq!(Header::parse(&raw(0, 0)), Err(HeaderError::Version { request: 7, version: 0 }));
    assert_eq!(Header::parse(&raw(2, 0)), Err(HeaderError::Version { request: 7, version: 2 }));
    assert_eq!(Header::parse(&raw(1 | 4, 0)), Err(HeaderError::Reply { request: 7 }));
    assert_eq!(
        Header::parse(&raw(1, MAX_PAYLOAD as u32 + 1)),
        Err(HeaderError::Oversize { request: 7, size: MAX_PAYLOAD as u32 + 1 })
    );
    assert!(Header::parse(&raw(1, MAX_PAYLOAD as u32)).is_ok());
}

#[test]
fn memory_table_has_a_descriptor_per_region() {
    let region = MemoryRegion { dpu_addr: 1, size: 2, user_addr: 3, mmap_offset: 4 };
    let table = words(&[2, 1, 2, 3, 4, 1, 2, 3, 4]);
    let Ok(Request::SetMemTable(regions)) = parse_at(number::SET_MEM_TABLE, &table, 2) else { panic!() };
    assert_eq!(regions, [region, region]);
    for fds in [0, 1, 3, 8, 253] {
        assert!(matches!(
            parse_at(number::SET_MEM_TABLE, &table, fds),
            Err(RequestError::Fds { expected: 2, .. })
        ));
    }
    assert!(matches!(
        parse_at(number::SET_MEM_TABLE, &words(&[0]), 0),
        Err(RequestError::Regions { regions: 0, .. })
    ));
    assert!(matches!(
        parse_at(number::SET_MEM_TABLE, &words(&[510]), 0),
        Err(RequestError::Regions { regions: 510, .. })
    ));
    assert!(matches!(
        parse_at(number::SET_MEM_TABLE, &table[..40], 2),
        Err(RequestError::Payload { size: 40, .. })
    ));
    let full = [words(&[509]), vec![0; 509 * 32]].concat();
    assert!(full.len() <= MAX_PAYLOAD, "the largest table fits the payload limit");
    assert!(matches!(
        parse_at(number::SET_MEM_TABLE, &full, 253),
        Err(RequestError::Fds { expected: 509, .. })
    ));
}

#[test]
fn single_region_is_padded_and_removal_tolerates_one_descriptor() {
    let region = MemoryRegion { dpu_addr: 1, size: 2, user_addr: 3, mmap_offset: 4 };
    let payload = words(&[0, 1, 2, 3, 4]);
    assert_eq!(parse_at(number::ADD_MEM_REG, &payload, 1), Ok(Request::AddMemReg(region)));
    assert!(parse_at(number::ADD_MEM_REG, &payload, 0).is_err());
    assert!(parse_at(number::ADD_MEM_REG, &payload, 2).is_err());
    assert_eq!(parse_at(number::REM_MEM_REG, &payload, 0), Ok(Request::RemMemReg(region)));
    assert_eq!(parse_at(number::REM_MEM_REG, &payload, 1), Ok(Request::RemMemReg(region)));
    assert!(parse_at(number::REM_MEM_REG, &payload, 2).is_err());
    assert!(parse_at(number::ADD_MEM_REG, &payload[..32], 1).is_err());
}

#[test]
fn ring_addresses_follow_struct_vhost_vring_addr() {
    let mut payload = vec![3, 0, 0, 0, 1, 0, 0, 0];
    payload.extend(words(&[0x1000, 0x2000, 0x3000, 0x4000]));
    assert_eq!(
        parse_at(number::SET_VRING_ADDR, &payload, 0),
        Ok(Request::SetVringAddr(VringAddress {
            index: 3,
            flags: 1,
            descriptor: 0x1000,
            used: 0x2000,
            available: 0x3000,
            log: 0x4000,
        }))
    );
    assert!(parse_at(number::SET_VRING_ADDR, &payload, 1).is_err());
}

#[test]
fn event_descriptor_and_no_descriptor_bit_must_agree() {
    for request in [number::SET_VRING_KICK, number::SET_VRING_CALL, number::SET_VRING_ERR] {
        assert!(parse_at(request, &words(&[2]), 1).is_ok());
        assert!(parse_at(request, &words(&[2]), 0).is_err());
        assert!(parse_at(request, &words(&[2]), 8).is_err());
        assert!(parse_at(request, &words(&[0x102]), 0).is_ok());
        assert!(parse_at(request, &words(&[0x102]), 1).is_err());
    }
    assert_eq!(
        parse_at(number::SET_VRING_KICK, &words(&[0x1ff]), 0),
        Ok(Request::SetVringKick(VringFd { index: 255, has_fd: false }))
    );
}

#[test]
fn log_base_comes_with_or_without_shared_memory() {
    assert_eq!(
        parse_at(number::SET_LOG_BASE, &words(&[4096, 16]), 1),
        Ok(Request::SetLogBase(Some(LogArea { size: 4096, offset: 16 })))
    );
    assert_eq!(parse_at(number::SET_LOG_BASE, &words(&[1]), 0), Ok(Request::SetLogBase(None)));
    assert!(parse_at(number::SET_LOG_BASE, &words(&[4096, 16]), 0).is_err());
    assert!(parse_at(number::SET_LOG_BASE, &words(&[1]), 1).is_err());
}

#[test]
fn config_access_stays_inside_the_configuration_space() {
    let config = |offset: u32, size: u32, data: usize| -> Vec<u8> {
        [offset, size, 0].iter().flat_map(|v| v.to_ne_bytes()).chain(vec![0; data]).collect()
    };
    assert!(parse_at(number::GET_CONFIG, &config(0, 40, 40), 0).is_ok());
    assert!(parse_at(number::GET_CONFIG, &config(0, 40, 0), 0).is_ok());
    assert!(parse_at(number::GET_CONFIG, &config(0, 40, 39), 0).is_err());
    assert!(parse_at(number::GET_CONFIG, &config(0, 0, 0), 0).is_err());
    assert!(parse_at(number::GET_CONFIG, &config(0, 257, 0), 0).is_err());
    assert!(parse_at(number::GET_CONFIG, &config(u32::MAX, 2, 0), 0).is_err());
    assert!(parse_at(number::SET_CONFIG, &config(0, 4, 4), 0).is_ok());
    assert!(parse_at(number::SET_CONFIG, &config(0, 4, 0), 0).is_err());
}

#[test]
fn unknown_requests_are_values_whatever_comes_with_them() {
    for request in [0, 19, 31, 35, 41, 44, 250, u32::MAX] {
        assert_eq!(parse_at(request, &[1, 2, 3], 8), Ok(Request::Unknown(request)));
    }
}

#[test]
fn replies_carry_the_request_and_the_reply_flag() {
    let bytes = Reply::U64(0x1122).encode(number::GET_FEATURES);
    assert_eq!(bytes[..12], [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
    assert_eq!(bytes[12..], 0x1122u64.to_ne_bytes());
    let bytes = Reply::Vring(VringState { index: 1, num: 7 }).encode(number::GET_VRING_BASE);
    assert_eq!(bytes[8..], [8, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0]);
    let bytes = Reply::Config(ConfigRange { offset: 0, size: 256, flags: 0 }, &[9; 300]).encode(24);
    assert_eq!(bytes.len(), MAX_REPLY);
    assert_eq!(Reply::Empty.encode(24).len(), HEADER_SIZE);
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail_without_panic(
        request in 0u32..60,
        payload in proptest::collection::vec(any::<u8>(), 0..700),
        fds in 0usize..=253,
    ) {
        let _ = parse_at(request, &payload, fds);
    }

    #[test]
    fn accepted_payloads_have_the_exact_size(size in 0usize..80, request in 1u32..41) {
        let fixed = [
            (number::SET_FEATURES, 8), (number::SET_VRING_NUM, 8), (number::SET_VRING_ADDR, 40),
            (number::SET_VRING_BASE, 8), (number::GET_VRING_BASE, 8), (number::SET_PROTOCOL_FEATURES, 8),
            (number::SET_VRING_ENABLE, 8), (number::SET_STATUS, 8), (number::GET_STATUS, 0),
            (number::GET_FEATURES, 0), (number::SET_OWNER, 0), (number::RESET_DEVICE, 0),
        ];
        if let Some((_, expected)) = fixed.iter().find(|(number, _)| *number == request) {
            prop_assert_eq!(parse_at(request, &vec![0; size], 0).is_ok(), size == *expected);
        }
    }
}
