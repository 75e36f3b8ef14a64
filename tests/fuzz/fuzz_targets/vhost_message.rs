//! The vhost-user message parser. See `checks/vhost_message.rs`.
#![no_main]

#[path = "../checks/vhost_message.rs"]
mod vhost_message;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    vhost_message::check(data);
});
