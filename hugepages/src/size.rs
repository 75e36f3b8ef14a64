//! Sizes as an operator writes them: an amount of memory and the size of one hugepage.
//!
//! Both refuse what could be misread. A bare number has no unit (QEMU's `-m 512` means MiB, `truncate -s 512`
//! means bytes), so it is an error here rather than a guess. Units are powers of 1024, as everywhere in memory.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Why a size could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No unit was given.
    #[error("`{0}` has no unit; write for example 512M or 2G")]
    NoUnit(String),
    /// Neither a number nor a known unit.
    #[error("`{0}` is not a size; write a number and one of K, M, G, T, for example 2G")]
    Malformed(String),
    /// More than 64 bits.
    #[error("`{0}` is more memory than 64 bits can count")]
    TooLarge(String),
    /// Zero, or a fraction of a byte.
    #[error("`{0}` is not a whole, non-zero number of bytes")]
    NotWhole(String),
    /// No hugepage can have this size.
    #[error("`{0}` cannot be a hugepage size: hugepage sizes are powers of two above 4K, such as 2M and 1G")]
    NotAPageSize(String),
}

/// An amount of memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let malformed = || SizeError::Malformed(text.to_owned());
        let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        if number.is_empty() {
            return Err(malformed());
        }
        let unit: u64 = match unit.to_ascii_lowercase().as_str() {
            "" => return Err(SizeError::NoUnit(text.to_owned())),
            "b" => 1,
            "k" | "kb" | "kib" => KIB,
            "m" | "mb" | "mib" => MIB,
            "g" | "gb" | "gib" => GIB,
            "t" | "tb" | "tib" => TIB,
            _ => return Err(malformed()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || number.ends_with('.') || fraction.contains('.') || fraction.len() > 12 {
            return Err(malformed());
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let whole: u128 = whole.parse().map_err(|_| too_large())?;
        let scale = 10u128.pow(fraction.len() as u32);
        let fraction: u128 =
            if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| malformed())? };
        let scaled = whole
            .checked_mul(scale)
            .and_then(|w| (w + fraction).checked_mul(u128::from(unit)))
            .ok_or_else(too_large)?;
        if scaled == 0 || scaled % scale != 0 {
            return Err(SizeError::NotWhole(text.to_owned()));
        }
        u64::try_from(scaled / scale).map(Bytes).map_err(|_| too_large())
    }
}

impl fmt::Display for Bytes {
    /// The largest unit that shows the amount exactly, else two decimals of the largest unit below it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")];
        for (unit, name) in units {
            if self.0 >= unit {
                if self.0.is_multiple_of(unit) {
                    return write!(f, "{} {name}", self.0 / unit);
                }
                return write!(f, "{:.2} {name}", self.0 as f64 / unit as f64);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// The size of one hugepage. Which sizes exist is for the kernel to say (`/sys/kernel/mm/hugepages`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u64);

impl PageSize {
    /// 2 MiB, the usual hugepage of x86-64 and of arm64 with 4 KiB base pages.
    pub const M2: PageSize = PageSize(2 * MIB);
    /// 1 GiB, a "gigantic" page: the kernel needs a contiguous, aligned GiB for each.
    pub const G1: PageSize = PageSize(GIB);

    /// From bytes. None when no hugepage can have this size (not a power of two, or no more than 4 KiB).
    pub const fn new(bytes: u64) -> Option<PageSize> {
        if bytes.is_power_of_two() && bytes > 4 * KIB { Some(PageSize(bytes)) } else { None }
    }

    /// From KiB, the unit of sysfs and `/proc`.
    pub const fn from_kib(kib: u64) -> Option<PageSize> {
        match kib.checked_mul(KIB) {
            Some(bytes) => PageSize::new(bytes),
            None => None,
        }
    }

    /// Bytes in one page.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// KiB in one page.
    pub const fn kib(self) -> u64 {
        self.0 / KIB
    }

    /// log2 of the size: what `MFD_HUGE_SHIFT` (`linux/memfd.h`) encodes.
    pub const fn shift(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// How many pages hold `bytes`, rounded up.
    pub const fn pages_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.0)
    }

    /// Name of this size's directory in sysfs (`mm/hugetlb_sysfs.c`: `hugepages-%lukB`).
    pub fn sysfs_name(self) -> String {
        format!("hugepages-{}kB", self.kib())
    }

    /// Name of this size in hugetlb cgroup files (`mm/hugetlb_cgroup.c`, `mem_fmt`): `2MB`, `1GB`, `64KB`.
    pub fn cgroup_name(self) -> String {
        match self.0 {
            b if b >= GIB => format!("{}GB", b / GIB),
            b if b >= MIB => format!("{}MB", b / MIB),
            b => format!("{}KB", b / KIB),
        }
    }

    /// Whether the buddy allocator cannot make such pages by itself, so that the kernel has to find a contiguous
    /// range (`hstate_is_gigantic`). True above 4 MiB on x86-64 (MAX_PAGE_ORDER 10 of 4 KiB pages).
    pub const fn is_gigantic(self) -> bool {
        self.0 > 4 * MIB
    }
}

impl FromStr for PageSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let Bytes(bytes) = text.parse()?;
        PageSize::new(bytes).ok_or_else(|| SizeError::NotAPageSize(text.to_owned()))
    }
}

impl fmt::Display for PageSize {
    /// As QEMU, mount(8) and the kernel command line take it: `2M`, `1G`, `64K`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&compact(self.0))
    }
}

impl Serialize for PageSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The shortest exact form that QEMU, libvirt and mount(8) all take: `4G`, `1536M`, `64K`.
pub fn compact(bytes: u64) -> String {
    for (unit, letter) in [(GIB, 'G'), (MIB, 'M'), (KIB, 'K')] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{}{letter}", bytes / unit);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_read_as_operators_write_them() {
        let bytes = |t: &str| t.parse::<Bytes>().map(|b| b.0);
        assert_eq!(bytes("2G"), Ok(2 << 30));
        assert_eq!(bytes("512m"), Ok(512 << 20));
        assert_eq!(bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(bytes("64KiB"), Ok(64 << 10));
        assert_eq!(bytes("4096B"), Ok(4096));
        assert_eq!(bytes("2048"), Err(SizeError::NoUnit("2048".into())));
        assert_eq!(bytes("0G"), Err(SizeError::NotWhole("0G".into())));
        assert_eq!(bytes("0.3K"), Err(SizeError::NotWhole("0.3K".into())));
        assert_eq!(bytes("99999999T"), Err(SizeError::TooLarge("99999999T".into())));
        for bad in ["", "G", "-1G", "1..5G", "1.G", ".5G", "2X", "2 G", "0x10M", "1G1"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn page_sizes_are_powers_of_two_above_a_base_page() {
        assert_eq!("2M".parse(), Ok(PageSize::M2));
        assert_eq!("2048kB".parse(), Ok(PageSize::M2));
        assert_eq!("1024M".parse(), Ok(PageSize::G1));
        assert!(matches!("3M".parse::<PageSize>(), Err(SizeError::NotAPageSize(_))));
        assert!(matches!("4K".parse::<PageSize>(), Err(SizeError::NotAPageSize(_))));
        assert_eq!(PageSize::M2.sysfs_name(), "hugepages-2048kB");
        assert_eq!(PageSize::G1.cgroup_name(), "1GB");
        assert_eq!(PageSize::M2.shift(), 21);
        assert_eq!(PageSize::M2.pages_for((2 << 20) + 1), 2);
        assert_eq!((PageSize::G1.to_string(), PageSize::M2.to_string()), ("1G".into(), "2M".into()));
    }

    #[test]
    fn amounts_print_exactly_where_they_can() {
        assert_eq!(Bytes(4 << 30).to_string(), "4 GiB");
        assert_eq!(Bytes(1536 << 20).to_string(), "1.50 GiB");
        assert_eq!(Bytes(12).to_string(), "12 bytes");
        assert_eq!(compact(1536 << 20), "1536M");
    }

    proptest! {
        #[test]
        fn compact_reads_back(kib in 1u64..=(1 << 40)) {
            prop_assert_eq!(compact(kib << 10).parse::<Bytes>(), Ok(Bytes(kib << 10)));
        }

        #[test]
        fn any_text_gives_a_value_or_an_error(text in "\\PC{0,24}") {
            let _ = text.parse::<Bytes>();
            let _ = text.parse::<PageSize>();
        }
    }
}
