//! The device that the front end sees.
#![forbid(unsafe_code)]

use std::str::FromStr;
use std::time::Duration;

/// Request queues a front end may set up at most. Sixteen workers saturate any link we know of, and
/// QEMU refuses to start when a device offers fewer queues than it was told to use.
pub const MAX_REQUEST_QUEUES: u16 = 16;

/// Largest ring a front end may set up (virtio 1.3, 2.7: at most 32768 entries).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Longest time a queue worker may be told to poll.
pub const MAX_POLL_WINDOW: Duration = Duration::from_millis(10);

/// Most threads beside the queue workers.
pub const MAX_POOL_SIZE: usize = 1024;

/// Options of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Tag in the configuration space; `Some` turns on `VHOST_USER_PROTOCOL_F_CONFIG`.
    pub tag: Option<Tag>,
    /// Request queues offered, 1 to [`MAX_REQUEST_QUEUES`]; the high priority queue is not counted.
    pub request_queues: u16,
    /// Largest accepted ring, a power of two.
    pub queue_size: u16,
    /// Longest time a worker polls its ring before it sleeps; zero: it never polls.
    pub poll_window: Duration,
    /// Threads that run requests beside the queue workers; 0: the workers run them.
    pub pool_size: usize,
}

/// Name of the export in the device's configuration space (virtio 1.3, 5.11.4): 1 to 36 bytes of UTF-8.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// Size of the `tag` field (virtio 1.3, 5.11.4).
    pub const MAX: usize = 36;

    /// The tag.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The field of the configuration space: padded with NUL.
    pub fn field(&self) -> [u8; Self::MAX] {
        let mut field = [0; Self::MAX];
        for (to, from) in field.iter_mut().zip(self.0.bytes()) {
            *to = from;
        }
        field
    }
}

/// Why a tag was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TagError {
    /// No tag at all.
    #[error("a tag needs at least one byte")]
    Empty,
    /// Does not fit the field.
    #[error("the tag has {0} bytes, the device has room for {max}", max = Tag::MAX)]
    TooLong(usize),
    /// A NUL would end it early for the driver.
    #[error("the tag contains a NUL byte")]
    Nul,
}

impl FromStr for Tag {
    type Err = TagError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.len() {
            0 => Err(TagError::Empty),
            len if len > Self::MAX => Err(TagError::TooLong(len)),
            _ if text.contains('\0') => Err(TagError::Nul),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_fit_the_configuration_space() {
        let longest = "t".repeat(Tag::MAX);
        assert_eq!(longest.parse::<Tag>().unwrap().field(), [b't'; Tag::MAX]);
        let field = "fs".parse::<Tag>().unwrap().field();
        assert_eq!((&field[..2], &field[2..]), (&b"fs"[..], &[0; 34][..]));
        assert_eq!("".parse::<Tag>(), Err(TagError::Empty));
        assert_eq!("ä".repeat(19).parse::<Tag>(), Err(TagError::TooLong(38)));
        assert_eq!("a\0b".parse::<Tag>(), Err(TagError::Nul));
    }
}
