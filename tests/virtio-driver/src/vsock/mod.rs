//! Plays the DPU's virtio-vsock driver: packets over the three rings ([`Vsock`]) and sockets with the
//! bookkeeping of a kernel ([`socket::Socket`]).
//!
//! Buffers look like those of Linux 6.2 and later: receive buffers of one page in one descriptor, packets
//! for the host as a header and its payload in two.

pub mod packet;
pub mod socket;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::{Device, DeviceOptions};
use crate::memory::{DpuBuffer, DpuMemory};
use crate::ring::{Chain, Descriptor, Ring};
use crate::{Error, Result};
use packet::{HEADER_LEN, Header, Packet};

/// Queue numbers.
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Bytes of a receive buffer, header included (`VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE` is this less some overhead).
pub const RX_BUFFER: usize = 4096;
/// Largest payload of a packet (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: usize = 64 << 10;
/// Bytes of an event.
const EVENT_LEN: usize = 4;
const EVENT_BUFFERS: usize = 8;
/// How long the driver waits for the device to take a packet.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A buffer on a ring, by head.
type Slots = Vec<Option<usize>>;

/// The driver of one DPU.
#[derive(Debug)]
pub struct Vsock {
    device: Device,
    rings: Vec<Ring>,
    rx_buffers: Vec<(DpuBuffer, Chain)>,
    rx_slots: Slots,
    tx_buffers: Vec<DpuBuffer>,
    tx_free: Vec<usize>,
    tx_slots: Slots,
    events: Vec<(DpuBuffer, Chain)>,
    event_slots: Slots,
    cid: u64,
    inbox: VecDeque<Packet>,
    /// Packets were put on the tx ring and not published.
    unpublished: bool,
}

impl Vsock {
    /// Connects to a device: negotiation, memory, rings, receive buffers. `options.rings` is set to 3.
    pub fn connect(socket: UnixStream, options: DeviceOptions) -> Result<Self> {
        let options = DeviceOptions { rings: 3, ..options };
        let (device, rings) = Device::connect(socket, options)?;
        Self::drive(device, rings)
    }

    /// Takes over a device whose rings run.
    pub fn drive(device: Device, rings: Vec<Ring>) -> Result<Self> {
        let config = device.frontend().get_config(0, 8)?;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&config);
        let memory = Arc::clone(device.memory());
        let size = usize::from(device.options().ring_size);
        let buffers = |count: usize, len: usize| -> Result<Vec<(DpuBuffer, Chain)>> {
            (0..count).map(|_| receive_buffer(&memory, len)).collect()
        };
        let mut driver = Vsock {
            rx_buffers: buffers(size, RX_BUFFER)?,
            rx_slots: vec![None; size],
            tx_buffers: (0..size / 2)
                .map(|_| memory.allocate(HEADER_LEN + MAX_PAYLOAD))
                .collect::<Result<_>>()?,
            tx_free: (0..size / 2).collect(),
            tx_slots: vec![None; size],
            events: buffers(EVENT_BUFFERS.min(size), EVENT_LEN)?,
            event_slots: vec![None; size],
            cid: u64::from_le_bytes(bytes),
            device,
            rings,
            inbox: VecDeque::new(),
            unpublished: false,
        };
        for index in 0..driver.rx_buffers.len() {
            driver.offer(RX, index)?;
        }
        for index in 0..driver.events.len() {
            driver.offer(EVENT, index)?;
        }
        for ring in [RX, EVENT] {
            driver.rings[ring].publish();
            driver.rings[ring].notify()?;
        }
        Ok(driver)
    }

    fn offer(&mut self, ring: usize, index: usize) -> Result<()> {
        let (buffers, slots) = match ring {
            RX => (&self.rx_buffers, &mut self.rx_slots),
            _ => (&self.events, &mut self.event_slots),
        };
        let head = self.rings[ring].add(&buffers[index].1)?;
        slots[usize::from(head)] = Some(index);
        Ok(())
    }

    /// Context id, from the configuration space.
    pub fn cid(&self) -> u64 {
        self.cid
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The rings: rx, tx, event.
    pub fn rings_mut(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    /// Gives device and rings back, with the memory and what is on the rings as it is.
    pub fn into_parts(self) -> (Device, Vec<Ring>) {
        (self.device, self.rings)
    }

    /// Puts a packet on the tx ring; the device sees it with [`Vsock::flush`], or when the ring is full.
    pub fn queue(&mut self, header: &Header, payload: &[u8]) -> Result<()> {
        let index = self.tx_slot()?;
        let buffer = &self.tx_buffers[index];
        buffer.put(0, header);
        let mut descriptors = vec![Descriptor::readable(buffer.gpa(), HEADER_LEN)];
        if !payload.is_empty() {
            buffer.write(HEADER_LEN, payload);
            descriptors.push(Descriptor::readable(buffer.gpa() + HEADER_LEN as u64, payload.len()));
        }
        let head = self.rings[TX].add(&Chain::direct(descriptors))?;
        self.tx_slots[usize::from(head)] = Some(index);
        self.unpublished = true;
        Ok(())
    }

    /// Shows the device what was queued.
    pub fn flush(&mut self) -> Result<()> {
        if std::mem::take(&mut self.unpublished) {
            self.rings[TX].publish();
            self.rings[TX].notify()?;
        }
        Ok(())
    }

    /// Sends one packet.
    pub fn send(&mut self, header: &Header, payload: &[u8]) -> Result<()> {
        self.queue(header, payload)?;
        self.flush()
    }

    /// Sends the bytes of one packet as any number of descriptors.
    pub fn send_raw(&mut self, pieces: &[&[u8]]) -> Result<()> {
        let index = self.tx_slot()?;
        let buffer = &self.tx_buffers[index];
        let (mut at, mut descriptors) = (0, Vec::new());
        for piece in pieces {
            buffer.write(at, piece);
            descriptors.push(Descriptor::readable(buffer.gpa() + at as u64, piece.len()));
            at += piece.len();
        }
        let head = self.rings[TX].add(&Chain::direct(descriptors))?;
        self.tx_slots[usize::from(head)] = Some(index);
        self.unpublished = true;
        self.flush()
    }

    /// A free tx buffer, waiting for the device to give one back if need be.
    fn tx_slot(&mut self) -> Result<usize> {
        self.reclaim()?;
        if self.tx_free.is_empty() {
            self.flush()?;
            let used = self.rings[TX].wait_used(PATIENCE)?;
            self.freed(used.head);
            self.reclaim()?;
        }
        self.tx_free.pop().ok_or(Error::RingFull)
    }

    fn reclaim(&mut self) -> Result<()> {
        while let Some(used) = self.rings[TX].take_used()? {
            self.freed(used.head);
        }
        Ok(())
    }

    fn freed(&mut self, head: u16) {
        if let Some(index) = self.tx_slots[usize::from(head)].take() {
            self.tx_free.push(index);
        }
    }

    /// Waits until the device has taken every packet.
    pub fn drain(&mut self) -> Result<()> {
        self.flush()?;
        self.reclaim()?;
        while self.rings[TX].in_flight() > 0 {
            let used = self.rings[TX].wait_used(PATIENCE)?;
            self.freed(used.head);
        }
        Ok(())
    }

    /// Takes what has come into the inbox, without waiting; whether anything had.
    pub fn poll(&mut self) -> Result<bool> {
        let mut any = false;
        while let Some(used) = self.rings[RX].take_used()? {
            self.received(used.head, used.len)?;
            any = true;
        }
        if any {
            self.rings[RX].publish();
            self.rings[RX].notify()?;
        }
        Ok(any)
    }

    /// Waits for something to come into the inbox.
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        if self.poll()? {
            return Ok(());
        }
        let used = self.rings[RX].wait_used(limit)?;
        self.received(used.head, used.len)?;
        self.poll()?;
        self.rings[RX].publish();
        self.rings[RX].notify()
    }

    fn received(&mut self, head: u16, len: u32) -> Result<()> {
        let index = self.rx_slots[usize::from(head)]
            .take()
            .ok_or_else(|| Error::RingProtocol(format!("rx head {head} is not a buffer")))?;
        let buffer = &self.rx_buffers[index].0;
        let len = len as usize;
        if len < HEADER_LEN {
            return Err(Error::RingProtocol(format!("a packet of {len} bytes")));
        }
        let header: Header = buffer.get(0);
        let stated = header.len as usize;
        if HEADER_LEN + stated != len {
            return Err(Error::RingProtocol(format!("{len} bytes written for a payload of {stated}")));
        }
        let payload = buffer.to_vec(HEADER_LEN, stated);
        self.inbox.push_back(Packet { header, payload });
        self.offer(RX, index)
    }

    /// The next packet of any socket, waiting for it at most for `limit`.
    pub fn receive(&mut self, limit: Duration) -> Result<Packet> {
        self.receive_if(limit, |_| true)
    }

    /// The next packet that `wanted` accepts; others stay in the inbox.
    pub fn receive_if(&mut self, limit: Duration, wanted: impl Fn(&Header) -> bool) -> Result<Packet> {
        let start = Instant::now();
        let mut looked = 0;
        loop {
            if let Some(at) = self.inbox.iter().skip(looked).position(|packet| wanted(&packet.header))
                && let Some(packet) = self.inbox.remove(looked + at)
            {
                return Ok(packet);
            }
            looked = self.inbox.len();
            let left = limit.checked_sub(start.elapsed()).ok_or_else(|| Error::Timeout {
                what: "a packet for a socket of the DPU".into(),
                waited: limit,
            })?;
            self.wait(left)?;
        }
    }

    /// A packet that has come and that `wanted` accepts.
    pub fn take_if(&mut self, wanted: impl Fn(&Header) -> bool) -> Option<Packet> {
        let at = self.inbox.iter().position(|packet| wanted(&packet.header))?;
        self.inbox.remove(at)
    }

    /// The next event, waiting for it at most for `limit`.
    pub fn event(&mut self, limit: Duration) -> Result<u32> {
        let used = self.rings[EVENT].wait_used(limit)?;
        let index = self.event_slots[usize::from(used.head)]
            .take()
            .ok_or_else(|| Error::RingProtocol(format!("event head {} is not a buffer", used.head)))?;
        if used.len as usize != EVENT_LEN {
            return Err(Error::RingProtocol(format!("an event of {} bytes", used.len)));
        }
        let event: u32 = self.events[index].0.get(0);
        self.offer(EVENT, index)?;
        self.rings[EVENT].publish();
        self.rings[EVENT].notify()?;
        Ok(event)
    }
}

fn receive_buffer(memory: &DpuMemory, len: usize) -> Result<(DpuBuffer, Chain)> {
    let buffer = memory.allocate(len)?;
    let chain = Chain::direct(vec![Descriptor::writable(buffer.gpa(), len)]);
    Ok((buffer, chain))
}
