//! What one DPU may take, and what it did.
#![forbid(unsafe_code)]

/// What one DPU may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Connections, those included that wait for a peer.
    pub connections: usize,
    /// Host programs whose greeting is not complete. One more pushes the oldest out.
    pub greetings: usize,
    /// Resets that wait for buffers of the DPU.
    pub resets: usize,
    /// Window of a connection, bytes: what the DPU may send ahead of its host program.
    pub window: u32,
    /// Window of a connection that moves bulk data, bytes.
    pub bulk_window: u32,
    /// Bytes of all windows together. Beyond half of it a new connection gets [`SMALL_WINDOW`] only,
    /// so that many can still be had.
    pub windows: u64,
}

/// Window of a connection when windows are scarce, bytes: one packet of the largest size.
pub const SMALL_WINDOW: u32 = crate::packet::MAX_PAYLOAD;

impl Default for Quotas {
    fn default() -> Self {
        Self {
            connections: 4096,
            greetings: 256,
            resets: 1024,
            window: 256 << 10,
            bulk_window: 1 << 20,
            windows: 512 << 20,
        }
    }
}

/// The windows that were promised to the DPU: memory that this side may have to provide.
#[derive(Debug)]
pub struct Windows {
    limit: u64,
    promised: u64,
}

impl Windows {
    /// Nothing promised of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self { limit, promised: 0 }
    }

    /// A window for a new connection, `wanted` bytes or fewer; `None` when nothing is left.
    pub fn promise(&mut self, wanted: u32) -> Option<u32> {
        let plenty = self.promised + u64::from(wanted) <= self.limit / 2;
        let window = if plenty { wanted } else { wanted.min(SMALL_WINDOW) };
        if self.promised + u64::from(window) > self.limit {
            return None;
        }
        self.promised += u64::from(window);
        Some(window)
    }

    /// Promises `more` bytes to a connection that has a window, if there is plenty.
    pub fn promise_more(&mut self, more: u32) -> bool {
        let plenty = self.promised + u64::from(more) <= self.limit / 2;
        if plenty {
            self.promised += u64::from(more);
        }
        plenty
    }

    /// A connection with this window is gone.
    pub fn release(&mut self, window: u32) {
        self.promised = self.promised.saturating_sub(u64::from(window));
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What happened, for those who ask.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// All of them with their names.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Connections that the DPU asked for and a rule allowed.
    connections_by_dpu,
    /// Connections that host programs asked for.
    connections_by_host,
    /// Requests of the DPU for a port that no rule names.
    refused_by_rule,
    /// Requests of the DPU that no host program took.
    refused_by_host,
    /// Requests of either side over a quota.
    refused_by_quota,
    /// Packets and buffers of the DPU that make no sense.
    bad_packets,
    /// Packets of the DPU that acknowledge what was never sent.
    bad_credit,
    /// Greetings of host programs that are none, or were not complete in time.
    bad_greetings,
    /// RST packets sent.
    resets_sent,
    /// RST packets that found no room in their queue.
    resets_dropped,
    /// Packets without payload sent.
    controls_sent,
    /// Packets with payload sent.
    packets_to_dpu,
    /// Packets received.
    packets_from_dpu,
    /// Payload sent.
    bytes_to_dpu,
    /// Payload received.
    bytes_from_dpu,
    /// Payload that could not be delivered any more.
    discarded_bytes,
    /// Connections that ended because a record fits nowhere on its way.
    oversized_records,
    /// Connections that ended with the DPU's driver or front end.
    lost_connections,
    /// Times that no descriptor was left for a host program that connects.
    accept_pauses,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_shrink_before_they_run_out() {
        let mut windows = Windows::new(1 << 20);
        assert_eq!(windows.promise(256 << 10), Some(256 << 10));
        assert_eq!(windows.promise(256 << 10), Some(256 << 10));
        let small: Vec<u32> = std::iter::from_fn(|| windows.promise(256 << 10)).collect();
        assert_eq!(small, [SMALL_WINDOW; 8]);
        assert!(!windows.promise_more(1));
        windows.release(SMALL_WINDOW);
        assert_eq!(windows.promise(256 << 10), Some(SMALL_WINDOW));
        assert_eq!(windows.promise(1), None);
    }

    #[test]
    fn counters_have_names() {
        let counters = Counters { bad_packets: 3, ..Counters::default() };
        let set: Vec<_> = counters.each().filter(|(_, count)| *count > 0).collect();
        assert_eq!(set, [("bad_packets", 3)]);
    }
}
