//! Byte streams over pieces: every cut, every offset.

use proptest::prelude::*;

use super::*;

fn memory() -> Arc<DpuMemory> {
    Arc::new(DpuMemory::anonymous(1 << 16).unwrap())
}

fn flatten(slices: Slices<'_>) -> Vec<(usize, usize)> {
    slices.as_iovecs().iter().map(|iovec| (iovec.iov_base as usize, iovec.iov_len)).collect()
}

#[test]
fn copies_cross_pieces_and_stop_at_the_end() {
    let memory = memory();
    memory.write(0, b"abc").unwrap();
    memory.write(100, b"defgh").unwrap();
    let mut chain = Chain::for_memory(&memory, &[(0, 3), (100, 5)], &[(200, 2), (300, 3)]).unwrap();
    let mut bytes = [0; 4];
    chain.copy_out(2, &mut bytes).unwrap();
    assert_eq!(&bytes, b"cdef");
    assert_eq!(chain.copy_out(5, &mut bytes), Err(ShortChain));
    assert_eq!(&bytes, b"cdef", "unchanged");
    assert_eq!(chain.copy_out(usize::MAX, &mut [0]), Err(ShortChain));
    chain.copy_out(8, &mut []).unwrap();
    assert_eq!(chain.copy_out(9, &mut []), Err(ShortChain));
    chain.copy_in(1, b"xyz").unwrap();
    assert_eq!(chain.copy_in(3, b"xyz"), Err(ShortChain));
    let (mut first, mut second) = ([9; 2], [9; 3]);
    memory.read(200, &mut first).unwrap();
    memory.read(300, &mut second).unwrap();
    assert_eq!((&first, &second), (b"\0x", b"yz\0"));
}

#[test]
fn chain_outside_of_memory_cannot_be_made() {
    let memory = memory();
    assert!(Chain::for_memory(&memory, &[(1 << 16, 1)], &[]).is_err());
    assert!(Chain::for_memory(&memory, &[], &[((1 << 16) - 1, 2)]).is_err());
}

#[test]
fn slices_point_to_the_same_bytes() {
    let memory = memory();
    let base = memory.regions().next().unwrap().host_addr;
    let chain = Chain::for_memory(&memory, &[(0, 40), (64, 4096)], &[(0x2000, 16), (0x4000, 16)]).unwrap();
    let mut buf = SliceBuf::default();
    let slices = chain.readable_slices(40, 4096, &mut buf).unwrap();
    assert_eq!(slices.len(), 4096);
    assert_eq!(flatten(slices), [(base + 64, 4096)]);
    let slices = chain.writable_slices(8, 16, &mut buf).unwrap();
    assert_eq!(flatten(slices), [(base + 0x2008, 8), (base + 0x4000, 8)]);
    assert!(chain.writable_slices(0, 0, &mut buf).unwrap().is_empty());
    assert_eq!(chain.writable_slices(1, 32, &mut buf).unwrap_err(), ShortChain);
}

#[test]
fn chains_of_one_byte_descriptors_work() {
    let memory = memory();
    // Every other byte, so that none can be merged.
    let pieces: Vec<(u64, usize)> = (0..2000).map(|i| (i * 2, 1)).collect();
    let mut chain = Chain::for_memory(&memory, &[], &pieces).unwrap();
    let data: Vec<u8> = (0..2000).map(|i| i as u8).collect();
    chain.copy_in(0, &data).unwrap();
    let mut spread = vec![0; 4000];
    memory.read(0, &mut spread).unwrap();
    assert!(spread.iter().step_by(2).eq(data.iter()));
    let mut buf = SliceBuf::default();
    assert_eq!(chain.writable_slices(0, 2000, &mut buf).unwrap().as_iovecs().len(), 2000);
}

proptest! {
    #[test]
    fn any_cut_reads_like_one_buffer(
        cuts in proptest::collection::vec((0u64..60_000, 1usize..300), 0..12),
        offset in 0usize..3000, len in 0usize..3000,
    ) {
        let memory = memory();
        let image: Vec<u8> = (0..1usize << 16).map(|i| (i * 31 % 251) as u8).collect();
        memory.write(0, &image).unwrap();
        let stream: Vec<u8> =
            cuts.iter().flat_map(|(at, len)| image[*at as usize..*at as usize + len].to_vec()).collect();
        let chain = Chain::for_memory(&memory, &cuts, &cuts).unwrap();
        prop_assert_eq!(chain.readable_len(), stream.len());
        let expected = stream.get(offset..offset.saturating_add(len));
        let mut bytes = vec![0; len];
        prop_assert_eq!(chain.copy_out(offset, &mut bytes).is_ok(), expected.is_some());
        if let Some(expected) = expected {
            prop_assert_eq!(&bytes, expected);
        }
        let mut buf = SliceBuf::default();
        if let Ok(slices) = chain.writable_slices(offset, len, &mut buf) {
            prop_assert_eq!(slices.as_iovecs().iter().map(|iovec| iovec.iov_len).sum::<usize>(), len);
            prop_assert!(slices.as_iovecs().iter().all(|iovec| iovec.iov_len > 0));
        }
    }
}
