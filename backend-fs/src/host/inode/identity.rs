//! What makes two sightings of a file the same file.
#![forbid(unsafe_code)]

use std::hash::{BuildHasherDefault, Hash, Hasher};

use rustix::fs::Statx;

/// Identity on the host while an inode is pinned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) ino: u64,
    /// [`Mount::index`](crate::host::mount::Mount).
    pub(super) mount: u32,
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.ino ^ (u64::from(self.mount) << 48));
    }
}

/// Inode numbers come from the host, so a mixing function (the finaliser of MurmurHash3) will do.
#[derive(Default)]
pub(super) struct InodeHasher(u64);

impl Hasher for InodeHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mut mixed = self.0 ^ value;
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        self.0 = mixed ^ (mixed >> 33);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Hashes [`Key`]s.
pub(super) type InodeHash = BuildHasherDefault<InodeHasher>;

/// Creation time in nanoseconds, 0 where the file system has none.
pub(super) fn birth(stat: &Statx) -> i64 {
    stat.stx_btime.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(i64::from(stat.stx_btime.tv_nsec))
}

/// `S_IFMT` bits.
pub(in crate::host) fn kind_of(stat: &Statx) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::BuildHasher;

    use super::*;

    #[test]
    fn neighbouring_numbers_spread_over_all_shards() {
        let hash = InodeHash::default();
        for mount in [1, 2, 77] {
            let shards: HashSet<u64> =
                (0..1000).map(|ino| (hash.hash_one(Key { ino, mount }) >> 40) % 64).collect();
            assert_eq!(shards.len(), 64);
        }
    }
}
