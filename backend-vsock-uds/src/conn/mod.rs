//! One connection between a DPU socket and a host socket, without any I/O.
//!
//! # Theory of operation
//!
//! A connection has two byte directions that end independently. Four facts say who is still there;
//! everything else follows from them:
//!
//! | fact | becomes false when |
//! |---|---|
//! | the DPU sends | the DPU said SHUTDOWN with the SEND flag |
//! | the DPU receives | the DPU said SHUTDOWN with the RCV flag |
//! | the host sends | the host socket gave end of file |
//! | the host receives | writing to the host socket failed, or its peer hung up |
//!
//! States (`on` lists what each input does in each):
//!
//! ```text
//!   DPU asks ──► HostConnecting ──connected──► Open ◄──RESPONSE── DpuConnecting ◄── host asks
//!                     │ failed, deadline        │ │                      │ RST, deadline, hang-up
//!                     ▼                         │ │                      ▼
//!                   Ended ◄──RST, flushed── DpuClosing  (the DPU closed; its last bytes go to the host)
//!                     ▲                           │
//!                     ├──RST, deadline──── HostClosing  (the host closed; waiting for the DPU's RST)
//!                     └──flushed, deadline── Draining   (the DPU is gone, or has waited long enough in
//!                                                        DpuClosing; its last bytes go to the host)
//! ```
//!
//! - **Last bytes always arrive.** Bytes taken from the DPU are written to the host even when the DPU
//!   closes or resets right after sending them (`DpuClosing`, `Draining`), for as long as the host
//!   program lives. Bytes of the host go to the DPU before its
//!   SHUTDOWN does.
//! - **An RST is never answered**, and after it nothing is sent on the pair.
//! - **Deadlines**: [`Timeouts::connect`] for either kind of connecting, [`Timeouts::linger`] for
//!   peers that owe an RST. `Open` has none: an idle connection is legal for ever. `Draining` has none
//!   either: what a DPU wrote and closed counts as sent there, so a host program may take its time, as
//!   with any Unix socket. The mux ends such connections when it needs their place.
//!
//! [`machine::Connection`] holds the state and the counters of [`credit`]; it is told what happened
//! ([`machine::Input`]), says what to do to the host socket ([`machine::Effects`]), and is asked what
//! to send to the DPU ([`machine::Connection::next_control`], [`machine::Connection::may_send`]).

pub mod credit;
pub mod machine;
#[cfg(test)]
mod model;
pub mod txbuf;

/// How long a connection may stay in a state that waits for a peer. Milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For the host socket to connect, or the DPU to answer a REQUEST. Linux gives up on its side
    /// after 2 s (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
    pub connect: u64,
    /// For the peer to finish a close. Linux gives up on its side after 8 s (`VSOCK_CLOSE_TIMEOUT`).
    pub linger: u64,
    /// For a host program to say which port it wants. Somebody may be typing it.
    pub greeting: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: 2_000, linger: 8_000, greeting: 10_000 }
    }
}
