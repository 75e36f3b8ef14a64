//! One connection with everything that belongs to it on the host's side.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::conn::machine::Connection;
use crate::conn::txbuf::TxBuf;
use crate::host::socket::HostSocket;

/// A record of a host program on its way to the DPU, packet by packet as credit allows.
#[derive(Debug)]
pub struct Record {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Of these, sent.
    pub sent: usize,
}

/// What is written to a socket when the DPU accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Nothing.
    None,
    /// `OK <port>`, for a host program that said `CONNECT`.
    Program,
    /// The sign for the mux of another DPU.
    Sibling,
}

/// The host's program behind a connection (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A connection and its host socket.
///
/// The socket is watched edge-triggered, once for its whole life: `readable` and `writable` remember
/// the edges until a call says `EAGAIN`. No state can therefore make the loop spin on an event that
/// nobody may act on (no credit, no buffers of the DPU, a direction that has ended).
#[derive(Debug)]
pub struct Channel {
    /// State machine.
    pub connection: Connection,
    /// Host socket, from connect to close.
    pub socket: Option<HostSocket>,
    /// Bytes of the DPU that the socket did not take yet.
    pub waiting: TxBuf,
    /// The socket may have something to read.
    pub readable: bool,
    /// The socket may take something.
    pub writable: bool,
    /// The socket's peer sends no more: after what it sent comes end of file, and no further edge.
    pub ending: bool,
    /// The socket's peer is gone: writing is over, too.
    pub hung_up: bool,
    /// Out-of-band data was seen: a read may stop short of it with more behind.
    pub urgent: bool,
    /// End of file was told to the state machine.
    pub ended: bool,
    /// A record of the host that is not sent completely.
    pub record: Option<Record>,
    /// Where to connect to, until that has worked.
    pub path: Option<PathBuf>,
    /// The host's program, where it is the one that connected.
    pub peer: Option<Peer>,
    /// What the other side waits to hear when the DPU accepts.
    pub greeting: Greeting,
    /// The socket leads to another DPU, which has not accepted yet.
    pub awaits_sibling: bool,
    /// Bytes the host took; decides whether the window is worth enlarging.
    pub taken: u64,
    /// Stands in the list of those that are kept only for their last bytes.
    pub draining: bool,
    /// Deadline that was set for the connection.
    pub armed: Option<u64>,
}

impl Channel {
    /// A channel without a socket yet.
    pub fn new(connection: Connection) -> Self {
        Self {
            connection,
            socket: None,
            waiting: TxBuf::default(),
            readable: false,
            writable: false,
            ending: false,
            hung_up: false,
            urgent: false,
            ended: false,
            record: None,
            path: None,
            peer: None,
            greeting: Greeting::None,
            awaits_sibling: false,
            taken: 0,
            draining: false,
            armed: None,
        }
    }

    /// Whether the host socket keeps the bounds of what it is sent.
    pub fn keeps_records(&self) -> bool {
        self.socket.as_ref().is_some_and(HostSocket::keeps_records)
    }

    /// Whether there is, or may be, something to send to the DPU now.
    pub fn has_something_for_dpu(&self) -> bool {
        let data = self.readable || self.record.is_some();
        self.connection.has_control() || (data && self.connection.may_send() > 0)
    }
}
