//! A socket of the DPU: what its kernel knows of one connection.

use std::time::Duration;

use super::packet::{
    HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, Packet, SEQ_EOM, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_SEQPACKET,
};
use super::{MAX_PAYLOAD, PATIENCE, Vsock};
use crate::{Error, Result};

/// Receive buffer of a socket (`VIRTIO_VSOCK_DEFAULT_BUF_SIZE`, Linux).
pub const BUFFER: u32 = 256 << 10;

/// One connection.
#[derive(Debug)]
pub struct Socket {
    /// Port on the DPU.
    pub port: u32,
    /// Context id of the other side.
    pub peer_cid: u64,
    /// Port there.
    pub peer_port: u32,
    /// `TYPE_*`.
    pub kind: u16,
    /// Receive buffer.
    pub buf_alloc: u32,
    fwd_cnt: u32,
    told_fwd_cnt: u32,
    unread: u32,
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// `SHUTDOWN_*` flags of the host's side.
    peer_shutdown: u32,
    reset: bool,
    received: Vec<u8>,
    /// Control packets received, for tests that count them.
    pub controls: usize,
}

impl Socket {
    fn new(port: u32, peer_cid: u64, peer_port: u32, kind: u16) -> Self {
        Socket {
            port,
            peer_cid,
            peer_port,
            kind,
            buf_alloc: BUFFER,
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            unread: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            peer_shutdown: 0,
            reset: false,
            received: Vec::new(),
            controls: 0,
        }
    }

    /// Connects to a port of the host. `None`: refused.
    pub fn connect(driver: &mut Vsock, port: u32, peer_port: u32, kind: u16) -> Result<Option<Self>> {
        Self::connect_to(driver, port, HOST_CID, peer_port, kind)
    }

    /// Connects to a port of another context id. `None`: refused.
    pub fn connect_to(
        driver: &mut Vsock,
        port: u32,
        peer_cid: u64,
        peer_port: u32,
        kind: u16,
    ) -> Result<Option<Self>> {
        let mut socket = Self::request(driver, port, peer_cid, peer_port, kind)?;
        Ok(socket.answered(driver)?.then_some(socket))
    }

    /// Asks for a connection without waiting for the answer.
    pub fn request(driver: &mut Vsock, port: u32, peer_cid: u64, peer_port: u32, kind: u16) -> Result<Self> {
        let mut socket = Socket::new(port, peer_cid, peer_port, kind);
        socket.tell(driver, OP_REQUEST, 0)?;
        Ok(socket)
    }

    /// Waits for the answer to a request: whether it was accepted.
    pub fn answered(&mut self, driver: &mut Vsock) -> Result<bool> {
        let answer = driver.receive_if(PATIENCE, |header| self.is_for(header))?;
        match answer.header.op {
            OP_RESPONSE => {
                self.heard(&answer.header);
                Ok(true)
            }
            OP_RST => Ok(false),
            op => Err(Error::RingProtocol(format!("operation {op} answers a request"))),
        }
    }

    /// Accepts the next connection to `port`.
    pub fn accept(driver: &mut Vsock, port: u32, limit: Duration) -> Result<Self> {
        let wanted = |header: &Header| header.op == OP_REQUEST && header.dst_port == port;
        let request = driver.receive_if(limit, wanted)?.header;
        let mut socket = Socket::new(port, request.src_cid, request.src_port, request.kind);
        socket.heard(&request);
        socket.tell(driver, OP_RESPONSE, 0)?;
        Ok(socket)
    }

    fn is_for(&self, header: &Header) -> bool {
        (header.dst_port, header.src_cid, header.src_port, header.kind)
            == (self.port, self.peer_cid, self.peer_port, self.kind)
    }

    fn header(&mut self, driver: &Vsock, op: u16, flags: u32, len: usize) -> Header {
        self.told_fwd_cnt = self.fwd_cnt;
        Header {
            src_cid: driver.cid(),
            dst_cid: self.peer_cid,
            src_port: self.port,
            dst_port: self.peer_port,
            len: len as u32,
            kind: self.kind,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Sends a packet without payload.
    pub fn tell(&mut self, driver: &mut Vsock, op: u16, flags: u32) -> Result<()> {
        let header = self.header(driver, op, flags, 0);
        driver.send(&header, &[])
    }

    fn heard(&mut self, header: &Header) {
        (self.peer_buf_alloc, self.peer_fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Bytes that may be sent now.
    pub fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Whether the connection was reset.
    pub fn is_reset(&self) -> bool {
        self.reset
    }

    /// `SHUTDOWN_*` flags the host has sent.
    pub fn peer_shutdown(&self) -> u32 {
        self.peer_shutdown
    }

    /// Takes what has come for this socket, without waiting.
    pub fn pump(&mut self, driver: &mut Vsock) -> Result<()> {
        driver.poll()?;
        while let Some(packet) = driver.take_if(|header| self.is_for(header)) {
            self.take(driver, packet)?;
        }
        Ok(())
    }

    /// Waits for the next packet of this socket.
    pub fn wait(&mut self, driver: &mut Vsock, limit: Duration) -> Result<()> {
        driver.flush()?;
        let packet = driver.receive_if(limit, |header| self.is_for(header))?;
        self.take(driver, packet)?;
        self.pump(driver)
    }

    fn take(&mut self, driver: &mut Vsock, packet: Packet) -> Result<()> {
        let header = packet.header;
        self.heard(&header);
        match header.op {
            OP_RW => {
                self.unread += header.len;
                if self.unread > self.buf_alloc {
                    return Err(Error::RingProtocol("the device overran the socket's buffer".into()));
                }
                if self.peer_shutdown & SHUTDOWN_SEND != 0 {
                    return Err(Error::RingProtocol("payload after the end of the direction".into()));
                }
                self.received.extend_from_slice(&packet.payload);
            }
            OP_SHUTDOWN => {
                self.controls += 1;
                self.peer_shutdown |= header.flags;
                if self.peer_shutdown == SHUTDOWN_RECEIVE | SHUTDOWN_SEND && self.unread == 0 {
                    self.reset = true;
                    self.tell(driver, OP_RST, 0)?;
                }
            }
            OP_RST => {
                self.controls += 1;
                self.reset = true;
            }
            OP_CREDIT_REQUEST => {
                self.controls += 1;
                self.tell(driver, OP_CREDIT_UPDATE, 0)?;
            }
            OP_CREDIT_UPDATE => self.controls += 1,
            op => return Err(Error::RingProtocol(format!("operation {op} on a connection"))),
        }
        Ok(())
    }

    /// Writes all of `bytes`, waiting for credit. Fails when the host takes no more.
    pub fn write_all(&mut self, driver: &mut Vsock, mut bytes: &[u8]) -> Result<()> {
        let record = self.kind == TYPE_SEQPACKET;
        while !bytes.is_empty() || record {
            let here = bytes.len().min(MAX_PAYLOAD).min(self.credit() as usize);
            if self.reset || self.peer_shutdown & SHUTDOWN_RECEIVE != 0 {
                return Err(Error::Disconnected { during: "a write of the DPU".into() });
            }
            if here == 0 && !bytes.is_empty() {
                self.wait(driver, PATIENCE)?;
                continue;
            }
            let (now, later) = bytes.split_at(here);
            let last = record && later.is_empty();
            let header = self.header(driver, OP_RW, if last { SEQ_EOM } else { 0 }, here);
            driver.queue(&header, now)?;
            self.tx_cnt = self.tx_cnt.wrapping_add(here as u32);
            bytes = later;
            if last {
                break;
            }
        }
        driver.flush()
    }

    /// Takes up to `limit` bytes that have come, and tells the device of the room when Linux would.
    pub fn read(&mut self, driver: &mut Vsock, limit: usize) -> Result<Vec<u8>> {
        let count = limit.min(self.received.len());
        let bytes = if count == self.received.len() {
            std::mem::take(&mut self.received)
        } else {
            self.received.drain(..count).collect()
        };
        self.unread -= count as u32;
        self.fwd_cnt = self.fwd_cnt.wrapping_add(count as u32);
        // virtio_transport_stream_do_dequeue() of net/vmw_vsock/virtio_transport_common.c.
        let free = self.buf_alloc - self.fwd_cnt.wrapping_sub(self.told_fwd_cnt).min(self.buf_alloc);
        if count > 0 && !self.reset && (free as usize) < MAX_PAYLOAD {
            self.tell(driver, OP_CREDIT_UPDATE, 0)?;
        }
        Ok(bytes)
    }

    /// Reads exactly `len` bytes, waiting for them.
    pub fn read_exact(&mut self, driver: &mut Vsock, len: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let more = self.read(driver, len - bytes.len())?;
            if more.is_empty() {
                if self.reset || self.peer_shutdown & SHUTDOWN_SEND != 0 {
                    return Err(Error::Disconnected { during: format!("a read of {len} bytes by the DPU") });
                }
                self.wait(driver, PATIENCE)?;
            }
            bytes.extend(more);
        }
        Ok(bytes)
    }

    /// Reads until the host has ended its direction.
    pub fn read_to_end(&mut self, driver: &mut Vsock) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        loop {
            let more = self.read(driver, usize::MAX)?;
            if more.is_empty() {
                if self.reset || self.peer_shutdown & SHUTDOWN_SEND != 0 {
                    return Ok(bytes);
                }
                self.wait(driver, PATIENCE)?;
            }
            bytes.extend(more);
        }
    }

    /// Ends a direction, or both.
    pub fn shutdown(&mut self, driver: &mut Vsock, flags: u32) -> Result<()> {
        self.tell(driver, OP_SHUTDOWN, flags)
    }

    /// Closes, and waits for the host's RST as a kernel does.
    pub fn close(mut self, driver: &mut Vsock) -> Result<()> {
        if self.reset {
            return Ok(());
        }
        self.shutdown(driver, SHUTDOWN_RECEIVE | SHUTDOWN_SEND)?;
        while !self.reset {
            let packet = driver.receive_if(PATIENCE, |header| self.is_for(header))?;
            self.reset = packet.header.op == OP_RST;
        }
        Ok(())
    }
}
