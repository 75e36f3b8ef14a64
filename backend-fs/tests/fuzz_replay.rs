//! Replays the inputs of the fuzz targets, so that what a fuzzer once found stays found without one.
//!
//! An input that broke something goes into `tests/fuzz/corpus/<target>` under a name that says what
//! it does.
#![allow(clippy::unwrap_used, reason = "a corpus that cannot be read fails the test")]

use std::fs;
use std::path::Path;

#[path = "../../tests/fuzz/checks/fuse_request.rs"]
mod fuse_request;
#[path = "../../tests/fuzz/checks/ring.rs"]
mod ring;
#[path = "../../tests/fuzz/checks/vhost_message.rs"]
mod vhost_message;

/// `refused` are the inputs that are not accepted; all others are.
fn replay(target: &str, check: fn(&[u8]) -> bool, refused: &[&str]) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(target);
    let inputs: Vec<_> = fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!inputs.is_empty(), "no inputs in {}", corpus.display());
    for input in inputs {
        println!("{}", input.display());
        let data = fs::read(&input).unwrap();
        let name = input.file_name().and_then(|name| name.to_str()).unwrap();
        assert_eq!(check(&data), !refused.contains(&name), "{name}: accepted or not");
        // Cut short at every byte: the cheapest of all mutations.
        (0..data.len()).for_each(|len| _ = check(&data[..len]));
    }
}

#[test]
fn requests_are_parsed_or_refused() {
    replay("fuse_request", fuse_request::check, &["lookup_dotdot"]);
}

#[test]
fn messages_are_parsed_or_refused() {
    replay("vhost_message", vhost_message::check, &["wrong_version"]);
}

#[test]
fn rings_give_whole_chains_or_none() {
    replay("ring", ring::check, &["loop", "outside", "nested"]);
}
