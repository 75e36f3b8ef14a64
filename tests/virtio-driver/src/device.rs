//! From a connected socket to running rings: what a VMM does when the DPU's driver says "driver ok".

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::frontend::{self, Frontend};
use crate::memory::{Backing, DpuMemory, Region};
use crate::ring::{Completion, Ring, RingConfig};
use crate::{Error, Result};

/// What the DPU's driver and its VMM agree to use.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    /// Number of rings.
    pub rings: u16,
    /// Descriptors per ring.
    pub ring_size: u16,
    /// Use `VIRTIO_RING_F_EVENT_IDX`.
    pub event_idx: bool,
    /// Use `VIRTIO_RING_F_INDIRECT_DESC`.
    pub indirect: bool,
    /// How the rings learn of completions.
    pub completion: Completion,
    /// Pages of the DPU memory.
    pub backing: Backing,
    /// Size of the DPU memory in bytes.
    pub memory: usize,
    /// Add the memory region by region (`ADD_MEM_REG`) where the daemon supports it, as QEMU does, instead of by one
    /// `SET_MEM_TABLE`.
    pub memory_slots: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions {
            rings: 2,
            ring_size: 128,
            event_idx: true,
            indirect: true,
            completion: Completion::Eventfd,
            backing: Backing::Memfd,
            memory: 64 << 20,
            memory_slots: true,
        }
    }
}

/// A connected device.
#[derive(Debug)]
pub struct Device {
    frontend: Frontend,
    memory: Arc<DpuMemory>,
    options: DeviceOptions,
    offered: u64,
    acked: u64,
}

impl Device {
    /// Negotiates, shares memory and starts `options.rings` rings, in QEMU's order. The rings are returned by index.
    pub fn connect(socket: UnixStream, options: DeviceOptions) -> Result<(Self, Vec<Ring>)> {
        let memory = DpuMemory::new(options.memory, options.backing)?;
        Self::connect_with(socket, options, memory)
    }

    /// Like [`Device::connect`] over memory that exists already, as after a reconnect.
    pub fn connect_with(
        socket: UnixStream,
        options: DeviceOptions,
        memory: Arc<DpuMemory>,
    ) -> Result<(Self, Vec<Ring>)> {
        let device = Self::negotiate(socket, options, memory)?;
        device.share_memory()?;
        let rings = (0..options.rings)
            .map(|index| {
                let ring = device.new_ring()?;
                device.frontend.start_ring(u32::from(index), &ring)?;
                Ok(ring)
            })
            .collect::<Result<Vec<_>>>()?;
        if device.frontend.protocol() & frontend::P_STATUS != 0 {
            device.frontend.set_status(frontend::STATUS_RUNNING)?;
        }
        Ok((device, rings))
    }

    /// Features only: owner, features, protocol features. No memory, no rings.
    pub fn negotiate(socket: UnixStream, options: DeviceOptions, memory: Arc<DpuMemory>) -> Result<Self> {
        let mut frontend = Frontend::new(socket)?;
        let offered = frontend.get_features()?;
        let mut wanted = frontend::F_VERSION_1 | frontend::F_PROTOCOL_FEATURES;
        if options.event_idx {
            wanted |= frontend::F_EVENT_IDX;
        }
        if options.indirect {
            wanted |= frontend::F_INDIRECT_DESC;
        }
        if let Some(name) = missing_feature(wanted & !offered) {
            return Err(Error::NotOffered { feature: name.to_owned() });
        }
        let protocol = frontend.get_protocol_features()?
            & (frontend::P_MQ
                | frontend::P_REPLY_ACK
                | frontend::P_CONFIG
                | frontend::P_RESET_DEVICE
                | frontend::P_CONFIGURE_MEM_SLOTS
                | frontend::P_STATUS);
        frontend.set_protocol_features(protocol)?;
        frontend.set_owner()?;
        if protocol & frontend::P_MQ != 0 {
            let rings = frontend.get_queue_num()?;
            if rings < u64::from(options.rings) {
                return Err(Error::NotOffered { feature: format!("{} rings (only {rings})", options.rings) });
            }
        }
        frontend.set_features(wanted)?;
        Ok(Device { frontend, memory, options, offered, acked: wanted })
    }

    /// Tells the daemon of all memory regions.
    pub fn share_memory(&self) -> Result<()> {
        if self.options.memory_slots && self.frontend.protocol() & frontend::P_CONFIGURE_MEM_SLOTS != 0 {
            let slots = self.frontend.get_max_mem_slots()?;
            let regions = self.memory.regions();
            if (slots as usize) < regions.len() {
                return Err(Error::NotOffered { feature: format!("{} memory slots", regions.len()) });
            }
            return regions.iter().try_for_each(|region| self.frontend.add_mem_region(region));
        }
        self.frontend.set_mem_table(&self.memory)
    }

    /// A ring of the negotiated kind that the daemon does not know of yet.
    pub fn new_ring(&self) -> Result<Ring> {
        let config = RingConfig {
            size: self.options.ring_size,
            event_idx: self.options.event_idx,
            completion: self.options.completion,
        };
        let mut ring = Ring::new(&self.memory, config)?;
        let socket = self.frontend.socket().try_clone();
        ring.watch_connection(socket.map_err(|e| Error::os("copy the socket's descriptor", e))?.into());
        Ok(ring)
    }

    /// Adds memory while the device runs.
    pub fn plug_memory(&self, len: usize) -> Result<Arc<Region>> {
        let region = self.memory.plug(len, self.options.backing)?;
        if self.frontend.protocol() & frontend::P_CONFIGURE_MEM_SLOTS != 0 {
            self.frontend.add_mem_region(&region)?;
        } else {
            self.frontend.set_mem_table(&self.memory)?;
        }
        Ok(region)
    }

    /// Removes memory while the device runs.
    pub fn unplug_memory(&self, region: &Arc<Region>) -> Result<()> {
        self.memory.unplug(region);
        if self.frontend.protocol() & frontend::P_CONFIGURE_MEM_SLOTS != 0 {
            self.frontend.remove_mem_region(region)
        } else {
            self.frontend.set_mem_table(&self.memory)
        }
    }

    /// The vhost-user connection.
    pub fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    /// The vhost-user connection, to change what is negotiated on it.
    pub fn frontend_mut(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The DPU's memory.
    pub fn memory(&self) -> &Arc<DpuMemory> {
        &self.memory
    }

    /// What was asked for.
    pub fn options(&self) -> DeviceOptions {
        self.options
    }

    /// Virtio features the daemon offered.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// Virtio features in force.
    pub fn features(&self) -> u64 {
        self.acked
    }
}

fn missing_feature(missing: u64) -> Option<&'static str> {
    [
        (frontend::F_VERSION_1, "VIRTIO_F_VERSION_1"),
        (frontend::F_PROTOCOL_FEATURES, "VHOST_USER_F_PROTOCOL_FEATURES"),
        (frontend::F_EVENT_IDX, "VIRTIO_RING_F_EVENT_IDX"),
        (frontend::F_INDIRECT_DESC, "VIRTIO_RING_F_INDIRECT_DESC"),
    ]
    .into_iter()
    .find(|(bit, _)| missing & bit != 0)
    .map(|(_, name)| name)
}
