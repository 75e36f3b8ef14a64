//! What a file system answered, for assertions.

use std::fmt::Debug;

use rustix::io::Errno;
use virtio_driver::fuse::FuseResult;

/// The errno an operation was refused with. A success fails the test, and so does a daemon that does not answer.
#[track_caller]
pub fn refusal<T: Debug>(what: &str, result: FuseResult<T>) -> Errno {
    match result {
        Ok(value) => panic!("{what} succeeded with {value:?}"),
        Err(error) => error.errno().unwrap_or_else(|| panic!("{what} was not answered: {error}")),
    }
}
