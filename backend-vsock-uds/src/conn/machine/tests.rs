//! What a connection does, input by input.

use super::*;

const WINDOW: u32 = 1000;
const TIMEOUTS: Timeouts = Timeouts { connect: 100, linger: 500, greeting: 0 };

fn open_from_dpu() -> Connection {
    let mut connection = Connection::from_dpu(Kind::Stream, WINDOW, TIMEOUTS, 0);
    connection.on(Input::HostConnected, 1);
    assert_eq!(next(&mut connection), Some((Op::Response, 0)));
    connection.update_credit(WINDOW, 0).expect("credit");
    connection
}

fn next(connection: &mut Connection) -> Option<(Op, u32)> {
    connection.next_control().map(|control| (control.op, control.flags))
}

fn drain_controls(connection: &mut Connection) -> Vec<(Op, u32)> {
    let due: Vec<_> = std::iter::from_fn(|| next(connection)).take(10).collect();
    assert!(due.len() < 10, "controls without end: {due:?}");
    due
}

fn rst() -> (Op, u32) {
    (Op::Rst, 0)
}

fn shutdown(flags: u32) -> (Op, u32) {
    (Op::Shutdown, flags)
}

#[test]
fn a_refused_host_socket_resets_the_dpu_once() {
    let mut connection = Connection::from_dpu(Kind::Stream, WINDOW, TIMEOUTS, 0);
    assert!(connection.on(Input::HostRefused, 1).close_host);
    assert_eq!(drain_controls(&mut connection), [rst()]);
    assert!(connection.is_over());
}

#[test]
fn a_host_socket_that_never_connects_resets_at_the_deadline() {
    let mut connection = Connection::from_dpu(Kind::Stream, WINDOW, TIMEOUTS, 7);
    assert_eq!(connection.deadline(), Some(107));
    connection.on(Input::DeadlinePassed, 107);
    assert_eq!(drain_controls(&mut connection), [rst()]);
}

#[test]
fn nothing_is_sent_before_the_response() {
    let mut connection = Connection::from_dpu(Kind::Stream, WINDOW, TIMEOUTS, 0);
    connection.update_credit(WINDOW, 0).expect("credit");
    connection.on(Input::HostConnected, 1);
    assert_eq!(connection.may_send(), 0);
    connection.next_control();
    assert_eq!(connection.may_send(), WINDOW);
}

#[test]
fn a_host_program_is_greeted_when_the_dpu_accepts() {
    let mut connection = Connection::from_host(Kind::Stream, WINDOW, TIMEOUTS, 0);
    assert_eq!(next(&mut connection), Some((Op::Request, 0)));
    assert!(connection.on(Input::DpuResponse, 1).greet_host);
    assert_eq!(connection.state(), State::Open);
    assert_eq!(connection.deadline(), None);
}

#[test]
fn a_response_to_a_request_that_was_never_sent_is_reset() {
    let mut connection = Connection::from_host(Kind::Stream, WINDOW, TIMEOUTS, 0);
    assert!(!connection.on(Input::DpuResponse, 1).greet_host);
    assert_eq!(drain_controls(&mut connection), [rst()]);
}

#[test]
fn a_host_program_that_leaves_before_its_request_went_out_leaves_no_trace() {
    let mut connection = Connection::from_host(Kind::Stream, WINDOW, TIMEOUTS, 0);
    connection.on(Input::HostGone, 1);
    assert_eq!(drain_controls(&mut connection), []);
    assert!(connection.is_over());
}

#[test]
fn a_host_program_that_ends_its_direction_early_still_gets_the_answer() {
    let mut connection = Connection::from_host(Kind::Stream, WINDOW, TIMEOUTS, 0);
    connection.next_control();
    connection.on(Input::HostEof, 1);
    assert!(connection.on(Input::DpuResponse, 2).greet_host);
    assert_eq!(drain_controls(&mut connection), [shutdown(SHUTDOWN_SEND)]);
    assert!(connection.on(Input::DpuData(10), 3).keep_data);
}

#[test]
fn host_end_of_file_ends_one_direction_only() {
    let mut connection = open_from_dpu();
    connection.on(Input::HostEof, 2);
    assert_eq!(drain_controls(&mut connection), [shutdown(SHUTDOWN_SEND)]);
    assert_eq!(connection.state(), State::Open);
    assert!(connection.on(Input::DpuData(10), 3).keep_data);
}

#[test]
fn dpu_half_close_reaches_the_host_after_the_last_byte() {
    let mut connection = open_from_dpu();
    assert!(connection.on(Input::DpuData(10), 2).keep_data);
    assert!(!connection.on(Input::DpuShutdown(SHUTDOWN_SEND), 3).shut_host_write, "bytes are still buffered");
    assert!(!connection.on(Input::HostTook(4), 4).shut_host_write);
    assert!(connection.on(Input::HostTook(6), 5).shut_host_write);
    assert_eq!(connection.may_send(), WINDOW, "the other direction lives");
}

#[test]
fn dpu_that_receives_no_more_stops_the_host_direction_only() {
    let mut connection = open_from_dpu();
    assert!(connection.on(Input::DpuShutdown(SHUTDOWN_RECEIVE), 2).shut_host_read);
    assert_eq!(connection.may_send(), 0);
    assert!(connection.on(Input::DpuData(10), 3).keep_data);
}

#[test]
fn dpu_close_is_answered_by_one_rst_after_the_last_byte() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuData(10), 2);
    connection.on(Input::DpuShutdown(SHUTDOWN_BOTH), 3);
    assert_eq!(connection.state(), State::DpuClosing);
    assert_eq!(connection.deadline(), Some(503));
    assert_eq!(drain_controls(&mut connection), []);
    assert!(connection.on(Input::HostTook(10), 4).close_host);
    assert_eq!(drain_controls(&mut connection), [rst()]);
    assert!(connection.is_over());
}

#[test]
fn bytes_sent_before_an_rst_still_reach_the_host() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuData(10), 2);
    assert!(!connection.on(Input::DpuRst, 3).close_host);
    assert_eq!(connection.state(), State::Draining);
    assert!(connection.wants_host_writable());
    assert!(connection.on(Input::HostTook(10), 4).close_host);
    assert_eq!(drain_controls(&mut connection), [], "an RST is never answered");
}

#[test]
fn host_that_left_tells_the_dpu_and_waits_for_its_rst() {
    let mut connection = open_from_dpu();
    connection.on(Input::HostEof, 2);
    assert!(connection.on(Input::HostGone, 2).close_host);
    assert_eq!(connection.state(), State::HostClosing);
    assert_eq!(drain_controls(&mut connection), [shutdown(SHUTDOWN_BOTH)]);
    connection.on(Input::DpuData(10), 3);
    connection.on(Input::DpuRst, 4);
    assert_eq!(drain_controls(&mut connection), []);
    assert!(connection.is_over());
}

#[test]
fn a_dpu_that_never_confirms_the_close_is_reset() {
    let mut connection = open_from_dpu();
    connection.on(Input::HostEof, 2);
    connection.on(Input::HostGone, 2);
    drain_controls(&mut connection);
    connection.on(Input::DeadlinePassed, 502);
    assert_eq!(drain_controls(&mut connection), [rst()]);
}

#[test]
fn host_that_stops_reading_ends_the_dpu_direction_only() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuData(10), 2);
    let effects = connection.on(Input::HostGone, 3);
    assert!(effects.discard && !effects.close_host);
    assert_eq!(drain_controls(&mut connection), [shutdown(SHUTDOWN_RECEIVE)]);
    assert_eq!(connection.may_send(), WINDOW, "the host's last bytes still go to the DPU");
}

#[test]
fn overrunning_the_window_is_reset() {
    let mut connection = open_from_dpu();
    assert!(connection.on(Input::DpuData(WINDOW), 2).keep_data);
    let effects = connection.on(Input::DpuData(1), 3);
    assert!(!effects.keep_data && effects.close_host);
    assert_eq!(drain_controls(&mut connection), [rst()]);
}

#[test]
fn data_after_the_dpu_said_it_sends_no_more_is_reset() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuShutdown(SHUTDOWN_SEND), 2);
    connection.on(Input::DpuData(1), 3);
    assert_eq!(drain_controls(&mut connection), [rst()]);
}

#[test]
fn a_second_request_on_a_live_pair_is_reset() {
    let mut connection = open_from_dpu();
    assert!(connection.on(Input::DpuRequest, 2).close_host);
    assert_eq!(drain_controls(&mut connection), [rst()]);
}

#[test]
fn a_credit_request_is_answered_once() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuCreditRequest, 2);
    connection.on(Input::DpuCreditRequest, 2);
    assert_eq!(drain_controls(&mut connection), [(Op::CreditUpdate, 0)]);
}

#[test]
fn a_dpu_that_closed_need_not_wait_for_a_slow_host() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuData(10), 2);
    connection.on(Input::DpuShutdown(SHUTDOWN_BOTH), 3);
    let effects = connection.on(Input::DeadlinePassed, 503);
    assert!(!effects.discard && !effects.close_host, "the bytes stay");
    assert_eq!(drain_controls(&mut connection), [rst()]);
    assert_eq!((connection.state(), connection.deadline()), (State::Draining, None));
    connection.on(Input::HostTook(4), 9000);
    assert!(connection.on(Input::HostTook(6), 9001).close_host);
    assert!(connection.is_over());
}

#[test]
fn an_rst_that_is_due_outlives_the_last_bytes() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuData(10), 2);
    connection.on(Input::DpuShutdown(SHUTDOWN_BOTH), 3);
    connection.on(Input::DeadlinePassed, 503);
    connection.on(Input::HostTook(10), 504);
    assert!(!connection.is_over());
    assert_eq!(drain_controls(&mut connection), [rst()]);
    assert!(connection.is_over());
}

#[test]
fn an_rst_of_the_dpu_makes_ours_unnecessary() {
    let mut connection = open_from_dpu();
    connection.on(Input::DpuRequest, 2);
    assert!(!connection.is_over());
    connection.on(Input::DpuRst, 3);
    assert_eq!(drain_controls(&mut connection), []);
    assert!(connection.is_over());
}

#[test]
fn an_empty_record_is_delivered_before_the_end() {
    let mut connection = open_from_dpu();
    assert!(connection.on(Input::DpuData(0), 2).keep_data);
    connection.on(Input::DpuRecord, 2);
    assert!(connection.wants_host_writable());
    assert!(!connection.on(Input::DpuShutdown(SHUTDOWN_SEND), 3).shut_host_write);
    assert!(connection.on(Input::HostTookRecord(0), 4).shut_host_write);
}

#[test]
fn an_abort_resets_the_dpu_and_closes_the_host() {
    let mut connection = open_from_dpu();
    assert!(connection.on(Input::Abort, 2).close_host);
    assert_eq!(drain_controls(&mut connection), [rst()]);
}
