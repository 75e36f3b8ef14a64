//! The state machine of one connection. See the [module](super) for the picture.
#![forbid(unsafe_code)]

use super::Timeouts;
use super::credit::{BadCredit, ReceiveWindow, SendCredit};
use crate::packet::{Kind, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Where a connection stands. The module's picture shows the ways between states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The DPU asked; the host socket is being connected.
    HostConnecting,
    /// A host program asked; the DPU has not answered.
    DpuConnecting,
    /// Bytes flow in every direction that has not ended.
    Open,
    /// The DPU closed; what it sent is being written to the host, then it gets its RST.
    DpuClosing,
    /// The host closed; the DPU was told and owes an RST.
    HostClosing,
    /// The DPU is gone; what it sent is being written to the host.
    Draining,
    /// Over. Once [`Connection::next_control`] gives nothing more, the connection can be forgotten.
    Ended,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The DPU asked again on the same pair.
    DpuRequest,
    /// The DPU accepted.
    DpuResponse,
    /// The DPU reset.
    DpuRst,
    /// The DPU sent this many payload bytes.
    DpuData(u32),
    /// The payload so far ends a record, which waits for the host socket as a whole. Only told for host
    /// sockets that keep records, where even an empty record has to be delivered.
    DpuRecord,
    /// The DPU ended directions: `SHUTDOWN_*` flags.
    DpuShutdown(u32),
    /// The DPU wants to know the buffer space.
    DpuCreditRequest,
    /// The host socket is connected.
    HostConnected,
    /// The host socket cannot be connected.
    HostRefused,
    /// The host socket gave end of file.
    HostEof,
    /// The host socket takes no more bytes: a write failed, or the peer hung up.
    HostGone,
    /// The host socket took this many of the buffered bytes.
    HostTook(u32),
    /// The host socket took a record of this many bytes.
    HostTookRecord(u32),
    /// The device cannot go on with the connection.
    Abort,
    /// The deadline of [`Connection::deadline`] passed.
    DeadlinePassed,
}

/// What to do to the host socket now. All false: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Keep the payload of this [`Input::DpuData`] for the host; otherwise drop it.
    pub keep_data: bool,
    /// Tell the host program that the DPU accepted (`OK <port>`).
    pub greet_host: bool,
    /// `shutdown(SHUT_WR)`: every byte of the DPU has been written.
    pub shut_host_write: bool,
    /// `shutdown(SHUT_RD)`: the DPU takes no more.
    pub shut_host_read: bool,
    /// Drop what is buffered for the host; it can never be delivered.
    pub discard: bool,
    /// Close the host socket.
    pub close_host: bool,
}

/// A packet without payload that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// Operation.
    pub op: Op,
    /// Flags of the operation.
    pub flags: u32,
    /// Our buffer space, for the header.
    pub buf_alloc: u32,
    /// Bytes taken out of our buffer, for the header.
    pub fwd_cnt: u32,
}

/// One connection.
#[derive(Clone, Debug)]
pub struct Connection {
    kind: Kind,
    state: State,
    timeouts: Timeouts,
    deadline: Option<u64>,
    dpu_sends: bool,
    dpu_receives: bool,
    host_sends: bool,
    host_receives: bool,
    /// `SHUTDOWN_*` flags the DPU has been told.
    told_shutdown: u32,
    pending_request: bool,
    pending_response: bool,
    pending_rst: bool,
    pending_credit: bool,
    request_sent: bool,
    credit: SendCredit,
    window: ReceiveWindow,
    /// Records that wait for the host socket.
    records: u32,
}

impl Connection {
    /// The DPU asked for a connection; the host socket is about to be connected.
    pub fn from_dpu(kind: Kind, window: u32, timeouts: Timeouts, now: u64) -> Self {
        Self::new(kind, State::HostConnecting, window, timeouts, now)
    }

    /// A host program asked for a connection; the REQUEST is due.
    pub fn from_host(kind: Kind, window: u32, timeouts: Timeouts, now: u64) -> Self {
        let mut connection = Self::new(kind, State::DpuConnecting, window, timeouts, now);
        connection.pending_request = true;
        connection
    }

    fn new(kind: Kind, state: State, window: u32, timeouts: Timeouts, now: u64) -> Self {
        Self {
            kind,
            state,
            timeouts,
            deadline: Some(now.saturating_add(timeouts.connect)),
            dpu_sends: true,
            dpu_receives: true,
            host_sends: true,
            host_receives: true,
            told_shutdown: 0,
            pending_request: false,
            pending_response: false,
            pending_rst: false,
            pending_credit: false,
            request_sent: false,
            credit: SendCredit::new(),
            window: ReceiveWindow::new(window),
            records: 0,
        }
    }

    /// Socket type.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// State.
    pub fn state(&self) -> State {
        self.state
    }

    /// When [`Input::DeadlinePassed`] is due, in the clock of `now`.
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Bytes of the DPU that wait for the host socket.
    pub fn buffered(&self) -> u32 {
        self.window.buffered()
    }

    /// Bytes the DPU may send beyond what it has: the room to keep for it.
    pub fn window(&self) -> u32 {
        self.window.size()
    }

    /// Makes the receive window smaller, if the DPU has not been told of it.
    pub fn limit_window(&mut self, size: u32) {
        self.window.limit(size);
    }

    /// Makes the receive window larger; the DPU learns it with the next packet.
    pub fn grow_window(&mut self, size: u32) {
        self.window.grow(size);
    }

    /// Whether the DPU has not heard of the connection yet.
    pub fn is_unasked(&self) -> bool {
        self.state == State::DpuConnecting && !self.request_sent
    }

    /// Whether the DPU takes what the host sends.
    pub fn dpu_receives(&self) -> bool {
        self.dpu_receives
    }

    /// Nothing is owed to anyone any more.
    pub fn is_over(&self) -> bool {
        self.state == State::Ended && !self.pending_rst
    }

    /// Whether the host socket is to be watched for room to write.
    pub fn wants_host_writable(&self) -> bool {
        !self.flushed()
            && self.host_receives
            && matches!(self.state, State::Open | State::DpuClosing | State::Draining)
    }

    /// Bytes that may be read from the host socket and sent to the DPU now. 0 also while a control
    /// packet must go first.
    pub fn may_send(&self) -> u32 {
        if self.state == State::Open && self.host_sends && self.dpu_receives && !self.pending_response {
            self.credit.available()
        } else {
            0
        }
    }

    /// Receive buffer of the DPU's socket, as it said last.
    pub fn peer_buffer(&self) -> u32 {
        self.credit.peer_buffer()
    }

    /// Records that `bytes` of the host went to the DPU, and gives `(buf_alloc, fwd_cnt)` for that packet.
    pub fn sent(&mut self, bytes: u32) -> (u32, u32) {
        self.credit.sent(bytes);
        self.tell()
    }

    fn tell(&mut self) -> (u32, u32) {
        self.pending_credit = false;
        self.window.tell()
    }

    /// Takes the credit numbers that every packet of the DPU carries. To be called before
    /// [`Connection::on`].
    ///
    /// # Errors
    /// [`BadCredit`]: the packet lies. The connection goes on with the earlier numbers.
    pub fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), BadCredit> {
        self.window.set_self_limit(buf_alloc);
        self.credit.update(buf_alloc, fwd_cnt)
    }

    /// Whether [`Connection::next_control`] would give something.
    pub fn has_control(&self) -> bool {
        self.next_op().is_some()
    }

    /// The next packet without payload for the DPU, if one is due; it counts as sent.
    pub fn next_control(&mut self) -> Option<Control> {
        let (op, flags) = self.next_op()?;
        match op {
            Op::Rst => self.pending_rst = false,
            Op::Request => {
                self.pending_request = false;
                self.request_sent = true;
            }
            Op::Response => self.pending_response = false,
            Op::Shutdown => self.told_shutdown |= flags,
            _ => {}
        }
        let (buf_alloc, fwd_cnt) = self.tell();
        Some(Control { op, flags, buf_alloc, fwd_cnt })
    }

    fn next_op(&self) -> Option<(Op, u32)> {
        if self.pending_rst {
            return Some((Op::Rst, 0));
        }
        if matches!(self.state, State::Ended | State::Draining) {
            return None;
        }
        if self.pending_request {
            return Some((Op::Request, 0));
        }
        if self.pending_response {
            return Some((Op::Response, 0));
        }
        if matches!(self.state, State::Open | State::HostClosing) {
            let flags = self.shutdown_flags();
            if flags & !self.told_shutdown != 0 {
                return Some((Op::Shutdown, flags));
            }
        }
        let credit_due = self.pending_credit || self.window.update_is_due();
        if self.state == State::Open && self.dpu_sends && credit_due {
            return Some((Op::CreditUpdate, 0));
        }
        None
    }

    /// Takes an input at time `now` and says what to do to the host socket.
    pub fn on(&mut self, input: Input, now: u64) -> Effects {
        match self.state {
            State::HostConnecting => self.host_connecting(input, now),
            State::DpuConnecting => self.dpu_connecting(input, now),
            State::Open => self.open(input, now),
            State::DpuClosing => self.dpu_closing(input),
            State::HostClosing => self.host_closing(input),
            State::Draining => self.draining(input),
            State::Ended => {
                // The DPU has forgotten the pair already.
                self.pending_rst &= input != Input::DpuRst;
                Effects::default()
            }
        }
    }

    fn host_connecting(&mut self, input: Input, _now: u64) -> Effects {
        match input {
            Input::HostConnected => {
                self.state = State::Open;
                self.deadline = None;
                self.pending_response = true;
                Effects::default()
            }
            Input::DpuRst => self.end(false),
            // The DPU gave up, broke the protocol, or nobody listens: the answer is the same.
            Input::HostRefused
            | Input::HostGone
            | Input::DeadlinePassed
            | Input::Abort
            | Input::DpuRequest
            | Input::DpuResponse
            | Input::DpuData(_)
            | Input::DpuShutdown(_) => self.end(true),
            Input::DpuCreditRequest
            | Input::DpuRecord
            | Input::HostEof
            | Input::HostTook(_)
            | Input::HostTookRecord(_) => Effects::default(),
        }
    }

    fn dpu_connecting(&mut self, input: Input, _now: u64) -> Effects {
        match input {
            Input::DpuResponse if self.request_sent => {
                self.state = State::Open;
                self.deadline = None;
                Effects { greet_host: true, ..Effects::default() }
            }
            Input::DpuRst => self.end(false),
            // A host program may end its own direction before the DPU has answered.
            Input::HostEof => {
                self.host_sends = false;
                Effects::default()
            }
            // What the DPU was never asked need not be taken back.
            Input::HostGone | Input::HostRefused | Input::Abort | Input::DeadlinePassed => {
                self.end(self.request_sent)
            }
            Input::DpuResponse | Input::DpuRequest | Input::DpuData(_) | Input::DpuShutdown(_) => {
                self.end(true)
            }
            Input::DpuCreditRequest
            | Input::DpuRecord
            | Input::HostConnected
            | Input::HostTook(_)
            | Input::HostTookRecord(_) => Effects::default(),
        }
    }

    fn open(&mut self, input: Input, now: u64) -> Effects {
        match input {
            Input::DpuData(bytes) => {
                if !self.dpu_sends || !self.window.receive(bytes) {
                    return self.end(true);
                }
                if !self.host_receives {
                    self.window.forward(bytes);
                    return Effects::default();
                }
                Effects { keep_data: true, ..Effects::default() }
            }
            Input::DpuRecord => {
                self.records += 1;
                Effects::default()
            }
            Input::HostTook(_) | Input::HostTookRecord(_) => {
                self.took(input);
                Effects { shut_host_write: self.flushed() && !self.dpu_sends, ..Effects::default() }
            }
            Input::DpuShutdown(flags) => self.dpu_shutdown(flags, now),
            Input::HostEof => {
                self.host_sends = false;
                self.close_if_host_left(now)
            }
            Input::HostGone => {
                self.host_receives = false;
                self.drop_buffered();
                let effects = self.close_if_host_left(now);
                Effects { discard: true, ..effects }
            }
            Input::DpuCreditRequest => {
                self.pending_credit = true;
                Effects::default()
            }
            Input::DpuRst => self.drain(),
            Input::DpuRequest | Input::DpuResponse | Input::Abort => self.end(true),
            Input::HostConnected | Input::HostRefused | Input::DeadlinePassed => Effects::default(),
        }
    }

    fn dpu_shutdown(&mut self, flags: u32, now: u64) -> Effects {
        let mut effects = Effects::default();
        if flags & SHUTDOWN_SEND != 0 && self.dpu_sends {
            self.dpu_sends = false;
            effects.shut_host_write = self.flushed() && self.host_receives;
        }
        if flags & SHUTDOWN_RECEIVE != 0 && self.dpu_receives {
            self.dpu_receives = false;
            effects.shut_host_read = true;
        }
        if self.dpu_sends || self.dpu_receives {
            return effects;
        }
        if self.flushed() {
            return self.end(true);
        }
        self.state = State::DpuClosing;
        self.deadline = Some(now.saturating_add(self.timeouts.linger));
        effects
    }

    fn dpu_closing(&mut self, input: Input) -> Effects {
        match input {
            Input::HostTook(_) | Input::HostTookRecord(_) => {
                self.took(input);
                if self.flushed() { self.end(true) } else { Effects::default() }
            }
            Input::DpuRst => self.drain(),
            // The host reads slowly, or not at all: the DPU need not wait any longer.
            Input::DeadlinePassed => {
                self.pending_rst = true;
                self.drain()
            }
            Input::HostGone | Input::Abort | Input::DpuRequest | Input::DpuResponse | Input::DpuData(_) => {
                self.end(true)
            }
            Input::DpuShutdown(_)
            | Input::DpuRecord
            | Input::DpuCreditRequest
            | Input::HostConnected
            | Input::HostRefused
            | Input::HostEof => Effects::default(),
        }
    }

    fn host_closing(&mut self, input: Input) -> Effects {
        match input {
            Input::DpuRst => self.end(false),
            Input::DpuShutdown(flags) => {
                self.dpu_sends &= flags & SHUTDOWN_SEND == 0;
                self.dpu_receives &= flags & SHUTDOWN_RECEIVE == 0;
                if self.dpu_sends || self.dpu_receives { Effects::default() } else { self.end(true) }
            }
            Input::DeadlinePassed | Input::Abort | Input::DpuRequest | Input::DpuResponse => self.end(true),
            // Bytes that were under way when the host left: nobody wants them.
            Input::DpuData(_)
            | Input::DpuRecord
            | Input::DpuCreditRequest
            | Input::HostConnected
            | Input::HostRefused
            | Input::HostEof
            | Input::HostGone
            | Input::HostTook(_)
            | Input::HostTookRecord(_) => Effects::default(),
        }
    }

    fn draining(&mut self, input: Input) -> Effects {
        match input {
            Input::HostTook(_) | Input::HostTookRecord(_) => {
                self.took(input);
                if self.flushed() { self.end(self.pending_rst) } else { Effects::default() }
            }
            Input::HostGone | Input::Abort => self.end(self.pending_rst),
            Input::DpuRst => {
                self.pending_rst = false;
                Effects::default()
            }
            Input::DpuRequest
            | Input::DpuResponse
            | Input::DpuData(_)
            | Input::DpuRecord
            | Input::DpuShutdown(_)
            | Input::DpuCreditRequest
            | Input::HostConnected
            | Input::HostRefused
            | Input::HostEof
            | Input::DeadlinePassed => Effects::default(),
        }
    }

    /// The host socket took bytes, or a record.
    fn took(&mut self, input: Input) {
        match input {
            Input::HostTook(bytes) => self.window.forward(bytes),
            Input::HostTookRecord(bytes) => {
                self.window.forward(bytes);
                self.records = self.records.saturating_sub(1);
            }
            _ => {}
        }
    }

    fn drop_buffered(&mut self) {
        self.window.forward(self.window.buffered());
        self.records = 0;
    }

    /// The host has left for good once it neither sends nor receives.
    fn close_if_host_left(&mut self, now: u64) -> Effects {
        if self.host_sends || self.host_receives {
            return Effects::default();
        }
        self.state = State::HostClosing;
        self.deadline = Some(now.saturating_add(self.timeouts.linger));
        Effects { close_host: true, ..Effects::default() }
    }

    /// The DPU is gone; its last bytes still go to the host.
    fn drain(&mut self) -> Effects {
        if self.flushed() || !self.host_receives {
            return self.end(self.pending_rst);
        }
        self.state = State::Draining;
        self.deadline = None;
        Effects { shut_host_read: true, ..Effects::default() }
    }

    fn end(&mut self, rst: bool) -> Effects {
        self.state = State::Ended;
        self.deadline = None;
        self.pending_rst = rst;
        let discard = !self.flushed();
        self.drop_buffered();
        Effects { close_host: true, discard, ..Effects::default() }
    }

    fn flushed(&self) -> bool {
        self.window.buffered() == 0 && self.records == 0
    }

    fn shutdown_flags(&self) -> u32 {
        if self.state == State::HostClosing {
            return SHUTDOWN_BOTH;
        }
        let sends = if self.host_sends { 0 } else { SHUTDOWN_SEND };
        let receives = if self.host_receives { 0 } else { SHUTDOWN_RECEIVE };
        sends | receives
    }
}

#[cfg(test)]
impl Connection {
    /// As if `count` bytes had gone each way and been taken.
    pub fn start_counters_at(&mut self, count: u32) {
        self.credit.start_at(count);
        self.window.start_at(count);
    }
}

#[cfg(test)]
#[path = "machine/tests.rs"]
mod tests;
