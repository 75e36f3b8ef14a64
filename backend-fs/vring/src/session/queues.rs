//! The queues of a session: what the front end told of each, and when that makes it run.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Device, Refused, Session};
use crate::memory::{DirtyLog, DpuMemory};
use crate::message::{LogArea, VRING_F_LOG, VringAddress, VringFd, VringState, feature};
use crate::ring::{Kick, Ring, RingAddresses, RingConfig, RingCounters};

/// What the front end told of one queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    size: u32,
    addresses: Option<RingAddresses>,
    /// DPU address at which writes to the used ring are logged.
    used_log: Option<u64>,
    base: u16,
    enabled: bool,
    pub(super) running: bool,
    /// Descriptors while the queue is stopped; a running ring owns its own.
    kick: Option<Kick>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// Survive restarts of the queue.
    counters: Arc<RingCounters>,
}

impl<D: Device> Session<'_, D> {
    fn queue(&mut self, index: u32) -> Result<(u16, &mut Queue), Refused> {
        match self.queues.get_mut(index as usize) {
            Some(queue) => Ok((index as u16, queue)),
            None => Err(Refused::NoQueue(index)),
        }
    }

    fn stopped_queue(&mut self, index: u32) -> Result<(u16, &mut Queue), Refused> {
        let (index, queue) = self.queue(index)?;
        if queue.running { Err(Refused::Running(index)) } else { Ok((index, queue)) }
    }

    pub(super) fn set_vring_num(&mut self, state: VringState) -> Result<(), Refused> {
        let largest = self.device.max_queue_size();
        let (index, queue) = self.stopped_queue(state.index)?;
        if !state.num.is_power_of_two() || state.num > largest {
            return Err(crate::ring::RingError::Size { index, size: state.num }.into());
        }
        queue.size = state.num;
        self.start_if_ready(index)
    }

    pub(super) fn set_vring_addr(&mut self, address: &VringAddress) -> Result<(), Refused> {
        let addresses = RingAddresses {
            descriptors: address.descriptor,
            available: address.available,
            used: address.used,
        };
        let (index, queue) = self.queue(address.index)?;
        // While the queue runs only the log may change: live migration sends the same addresses again.
        if queue.running && queue.addresses != Some(addresses) {
            return Err(Refused::Running(index));
        }
        queue.addresses = Some(addresses);
        queue.used_log = (address.flags & VRING_F_LOG != 0).then_some(address.log);
        if queue.running { self.apply_logs() } else { self.start_if_ready(index) }
    }

    pub(super) fn set_vring_base(&mut self, state: VringState) -> Result<(), Refused> {
        let base = u16::try_from(state.num).map_err(|_| Refused::Value(u64::from(state.num)))?;
        let (_, queue) = self.stopped_queue(state.index)?;
        queue.base = base;
        Ok(())
    }

    /// Stops the queue after its chains in flight came back.
    pub(super) fn get_vring_base(&mut self, state: VringState) -> Result<VringState, Refused> {
        let (index, _) = self.queue(state.index)?;
        self.stop(index);
        let (_, queue) = self.queue(state.index)?;
        // The next kick descriptor starts it again; the others stay, front ends set them only once.
        queue.kick = None;
        Ok(VringState { index: state.index, num: u32::from(queue.base) })
    }

    pub(super) fn set_vring_kick(&mut self, which: VringFd, fd: Option<OwnedFd>) -> Result<(), Refused> {
        let kick = fd.map_or(Kick::Poll, Kick::Event);
        let (index, queue) = self.queue(u32::from(which.index))?;
        if queue.running {
            return self.change_ring(index, |ring| ring.set_kick(kick));
        }
        queue.kick = Some(kick);
        self.start_if_ready(index)
    }

    pub(super) fn set_vring_call(&mut self, which: VringFd, fd: Option<OwnedFd>) -> Result<(), Refused> {
        let (index, queue) = self.queue(u32::from(which.index))?;
        if queue.running {
            return self.change_ring(index, |ring| ring.set_call(fd));
        }
        queue.call = fd;
        Ok(())
    }

    pub(super) fn set_vring_err(&mut self, which: VringFd, fd: Option<OwnedFd>) -> Result<(), Refused> {
        let (index, queue) = self.queue(u32::from(which.index))?;
        if queue.running {
            return self.change_ring(index, |ring| ring.set_err(fd));
        }
        queue.err = fd;
        Ok(())
    }

    pub(super) fn set_vring_enable(&mut self, state: VringState) -> Result<(), Refused> {
        if state.num > 1 {
            return Err(Refused::Value(u64::from(state.num)));
        }
        let (index, _) = self.queue(state.index)?;
        self.enable(index, state.num == 1)
    }

    pub(super) fn enable(&mut self, index: u16, enabled: bool) -> Result<(), Refused> {
        let (_, queue) = self.queue(u32::from(index))?;
        let changed = std::mem::replace(&mut queue.enabled, enabled) != enabled;
        match (queue.running, changed) {
            (true, true) => self.change_ring(index, |ring| ring.set_enabled(enabled)),
            (true, false) => Ok(()),
            (false, _) => self.start_if_ready(index),
        }
    }

    /// Starts the queue when everything it needs is there.
    fn start_if_ready(&mut self, index: u16) -> Result<(), Refused> {
        if self.memory.regions().next().is_none() {
            return Ok(());
        }
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let indirect = self.features & feature::INDIRECT_DESC != 0;
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return Ok(()) };
        let (Some(addresses), true) = (queue.addresses, queue.size > 0 && queue.enabled && !queue.running)
        else {
            return Ok(());
        };
        let Some(kick) = queue.kick.take() else { return Ok(()) };
        let config = RingConfig {
            index,
            size: queue.size,
            addresses,
            base: queue.base,
            event_idx,
            indirect,
            kick,
            call: queue.call.take(),
            err: queue.err.take(),
        };
        match Ring::new(Arc::clone(&self.memory), config) {
            Ok(mut ring) => {
                ring.set_counters(Arc::clone(&queue.counters));
                queue.running = true;
                self.set_ring_log(&mut ring);
                tracing::debug!(queue = index, size = ring.size(), base = ring.base(), "queue starts");
                self.resume(index, ring)
            }
            Err((error, config)) => {
                // Kept, so that a memory table that comes later can still start it.
                queue.kick = Some(config.kick);
                queue.call = config.call;
                queue.err = config.err;
                Err(error.into())
            }
        }
    }

    fn resume(&mut self, index: u16, ring: Ring) -> Result<(), Refused> {
        let base = ring.base();
        self.device.start(index, ring).map_err(|error| {
            if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                queue.running = false;
                queue.base = base;
            }
            Refused::Start(error)
        })
    }

    /// Changes the ring of a running queue between two requests.
    fn change_ring(&mut self, index: u16, change: impl FnOnce(&mut Ring)) -> Result<(), Refused> {
        match self.device.pause(index) {
            Some(mut ring) => {
                change(&mut ring);
                self.resume(index, ring)
            }
            None => Err(Refused::Stuck(index)),
        }
    }

    fn stop(&mut self, index: u16) {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return };
        if !std::mem::take(&mut queue.running) {
            return;
        }
        if let Some(ring) = self.device.stop(index) {
            queue.base = ring.base();
            (queue.kick, queue.call, queue.err) = {
                let (kick, call, err) = ring.into_notifiers();
                (Some(kick), call, err)
            };
            tracing::debug!(queue = index, base = queue.base, "queue stopped");
        }
    }

    pub(super) fn stop_all(&mut self) {
        for index in 0..self.queues.len() as u16 {
            self.stop(index);
        }
    }

    /// What the queues did, for the log; malformed chains are worth a warning.
    pub(super) fn log_totals(&self) {
        for (index, queue) in self.queues.iter().enumerate() {
            let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let counters = &queue.counters;
            let (chains, bad) = (total(&counters.chains), total(&counters.bad_chains));
            let (kicks, signals) = (total(&counters.kicks), total(&counters.signals));
            if chains > 0 {
                tracing::debug!(queue = index, chains, kicks, signals, "queue totals");
            }
            if bad > 0 {
                tracing::warn!(queue = index, "{bad} of {chains} descriptor chains were malformed");
            }
        }
    }

    /// Back to what a queue is after connecting.
    pub(super) fn forget_queues(&mut self) {
        for queue in &mut self.queues {
            let counters = Arc::clone(&queue.counters);
            *queue = Queue { counters, ..Queue::default() };
        }
    }

    /// Puts a new memory table in force. Queues whose rings are not in it stop.
    pub(super) fn change_memory(&mut self, memory: DpuMemory) {
        self.memory = Arc::new(memory);
        self.device.memory_changed(&self.memory);
        for index in 0..self.queues.len() as u16 {
            let result = if self.is_running(index) { self.remap(index) } else { self.start_if_ready(index) };
            if let Err(error) = result {
                tracing::error!(queue = index, "queue does not run with the new memory table: {error}");
            }
        }
    }

    fn remap(&mut self, index: u16) -> Result<(), Refused> {
        let Some(mut ring) = self.device.pause(index) else {
            return Err(Refused::Stuck(index));
        };
        match ring.remap(Arc::clone(&self.memory)) {
            Ok(()) => self.resume(index, ring),
            Err(error) => {
                ring.signal_error();
                if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                    queue.running = false;
                    queue.base = ring.base();
                    let (kick, call, err) = ring.into_notifiers();
                    (queue.kick, queue.call, queue.err) = (Some(kick), call, err);
                }
                Err(error.into())
            }
        }
    }

    fn is_running(&self, index: u16) -> bool {
        self.queues.get(usize::from(index)).is_some_and(|queue| queue.running)
    }

    /// `None` is the answer to the old form, which has no reply.
    pub(super) fn set_log_base(
        &mut self,
        area: Option<LogArea>,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<LogArea>, Refused> {
        // Only a log in shared memory can be written to from here.
        let Some(area) = area else { return Err(Refused::NoLog) };
        let fd = fds.pop().ok_or(Refused::NoFd)?;
        match DirtyLog::map(area, fd.as_fd(), &self.memory) {
            Ok(log) => {
                self.log = Some(Arc::new(log));
                self.log_failed = false;
                self.apply_logs()?;
                Ok(Some(area))
            }
            Err(error) => {
                // The front end cannot be told in a way that it understands; SET_FEATURES will refuse
                // to log, which it does understand.
                self.log_failed = true;
                Err(error.into())
            }
        }
    }

    /// Brings the logging of all running rings in line with features and log.
    pub(super) fn apply_logs(&mut self) -> Result<(), Refused> {
        for index in 0..self.queues.len() as u16 {
            if !self.is_running(index) {
                continue;
            }
            let Some(mut ring) = self.device.pause(index) else {
                return Err(Refused::Stuck(index));
            };
            self.set_ring_log(&mut ring);
            self.resume(index, ring)?;
        }
        Ok(())
    }

    fn set_ring_log(&self, ring: &mut Ring) {
        let log = self.log.as_ref().filter(|_| self.features & feature::LOG_ALL != 0);
        let used_at = self.queues.get(usize::from(ring.index())).and_then(|queue| queue.used_log);
        let used = self.log.as_ref().zip(used_at);
        ring.set_log(log.cloned(), used.map(|(log, at)| (Arc::clone(log), at)));
    }
}
