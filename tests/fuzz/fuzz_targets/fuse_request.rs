//! The FUSE request parser. See `checks/fuse_request.rs`.
#![no_main]

#[path = "../checks/fuse_request.rs"]
mod fuse_request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuse_request::check(data);
});
