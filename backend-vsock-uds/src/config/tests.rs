//! What a command line means.

use clap::Parser;

use super::*;
use crate::route::Route;

fn config(arguments: &[&str]) -> Result<Config, Error> {
    let argv = std::iter::once("backend-vsock-uds").chain(arguments.iter().copied());
    Config::try_from(Args::try_parse_from(argv).expect("clap accepts it"))
}

#[test]
fn a_command_line_of_vhost_device_vsock_means_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("vsock"));
    let (socket, uds) = (socket.to_str().unwrap(), uds.to_str().unwrap());
    let given = config(&[
        "--guest-cid=4",
        &format!("--socket={socket}"),
        &format!("--uds-path={uds}"),
        "--tx-buffer-size=65536",
        "--queue-size=256",
        "--groups=a+b",
    ])
    .unwrap();
    let dpu = &given.dpus[0];
    assert_eq!((dpu.cid, dpu.queue_size), (4, 256));
    assert_eq!((dpu.quotas.window, dpu.quotas.bulk_window), (65536, 65536));
    assert_eq!(dpu.groups, ["a".to_owned(), "b".to_owned()].into());
    assert_eq!(dpu.routes.lookup(80), Route::Socket(format!("{uds}_80").into()));
    assert_eq!(dpu.listeners.len(), 1);
    assert_eq!((dpu.listeners[0].port, dpu.listeners[0].path.as_path()), (None, Path::new(uds)));
    let pairs =
        format!("guest-cid=4,socket={socket},uds-path={uds},tx-buffer-size=65536,queue-size=256,groups=a+b");
    assert_eq!(config(&["--vm", &pairs]).unwrap(), given);
    let file = directory.path().join("config.yaml");
    std::fs::write(
        &file,
        format!(
            "vms:\n  - guest_cid: 4\n    socket: {socket}\n    uds_path: {uds}\n    tx_buffer_size: 65536\n    \
             queue_size: 256\n    groups: a+b\n"
        ),
    )
    .unwrap();
    assert_eq!(config(&["--config", file.to_str().unwrap()]).unwrap(), given);
}

#[test]
fn defaults_are_those_of_the_other_program_where_it_has_them() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vhost");
    let given = config(&["--socket-path", socket.to_str().unwrap(), "--port", "514=/dev/log"]).unwrap();
    let dpu = &given.dpus[0];
    assert_eq!((dpu.cid, dpu.queue_size), (3, 1024));
    assert_eq!(dpu.groups, ["default".to_owned()].into());
    assert_eq!(dpu.quotas, Quotas::default());
    assert_eq!(dpu.routes.lookup(514), Route::Socket("/dev/log".into()));
    assert_eq!(dpu.routes.lookup(515), Route::Refused);
    assert_eq!(given.socket_access, Access { owner: None, group: None, mode: 0o700 });
}

#[test]
fn listeners_lead_to_ports_and_keep_records_if_asked() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let given = config(&[
        "--socket",
        &at("vhost"),
        "--listen",
        &format!("22={}", at("ssh")),
        "--listen",
        &format!("23=seqpacket:{}", at("records")),
        "--socket-group",
        "0",
        "--uds-mode",
        "660",
    ])
    .unwrap();
    let listeners = &given.dpus[0].listeners;
    assert_eq!((listeners[0].port, listeners[0].kind), (Some(22), Kind::Stream));
    assert_eq!((listeners[1].port, listeners[1].kind), (Some(23), Kind::SeqPacket));
    assert_eq!(given.socket_access, Access { owner: None, group: Some(0), mode: 0o770 });
    assert_eq!(given.uds_access, Access { owner: None, group: None, mode: 0o660 });
}

#[test]
fn what_does_not_fit_this_host_is_exit_one() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("file"), "").unwrap();
    for arguments in [
        &["--socket", &at("missing/s"), "--uds-path", &at("u")][..],
        &["--socket", &at("file"), "--uds-path", &at("u")],
        &["--socket", &at("s"), "--uds-path", &at("file")],
        &["--socket", &at("s"), "--listen", &format!("1={}", at("file/x"))],
        &["--socket", &at("s"), "--uds-path", &at("u"), "--socket-owner", "no-such-user"],
        &["--socket", &at("s"), "--uds-path", &at("u"), "--uds-group", "no-such-group"],
        &["--config", &at("missing")],
    ] {
        let error = config(arguments).expect_err(&arguments.join(" "));
        assert_eq!(error.exit_code(), 1, "{error}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing was made");
}

#[test]
fn a_user_has_a_name_or_a_number() {
    assert_eq!(Access::new("socket", Some("root"), Some("7"), None).unwrap().owner, Some(0));
    assert!(Access::new("socket", Some("4294967295"), None, None).is_err(), "-1 would change nothing");
}
