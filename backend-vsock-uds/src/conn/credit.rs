//! Credit: how much one side may send before the other has taken bytes out of its buffer
//! (virtio 1.2, section 5.10.6.3).
//!
//! Each direction has a sender's and a receiver's half, and this side plays one of each:
//! [`SendCredit`] for host to DPU (the DPU's numbers are hostile), [`ReceiveWindow`] for DPU to host
//! (our numbers; a DPU that overruns them is reset).
//!
//! All counters are 32 bits and wrap. The arithmetic is on *differences*, which never exceed the
//! bytes in flight, and those never exceed a 32-bit `buf_alloc`: it holds across the wrap. What a
//! hostile DPU can do with its two numbers:
//!
//! | it says | result here |
//! |---|---|
//! | `buf_alloc` smaller than what is in flight | credit 0 until it has caught up (a plain subtraction would wrap to 4 GiB, CVE-2026-23069) |
//! | `buf_alloc` of 4 GiB | nothing: bytes go from the host socket straight into buffers that the DPU itself provides, none are queued here (a sender that queues would, CVE-2026-23086). A bound below what the DPU offers would even be wrong: Linux reports what it has read by what it offered, and would be waited for in vain |
//! | `fwd_cnt` ahead of what was sent, or going backwards | the update is ignored and reported |
#![forbid(unsafe_code)]

/// The DPU's `fwd_cnt` does not fit what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the DPU acknowledged {claimed} bytes of {in_flight} in flight")]
pub struct BadCredit {
    /// Bytes the DPU claims to have taken since its last update.
    pub claimed: u32,
    /// Bytes that were in flight.
    pub in_flight: u32,
}

/// Host to DPU: what may be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendCredit {
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
}

impl SendCredit {
    /// Nothing sent; nothing known of the DPU's buffer yet.
    pub fn new() -> Self {
        Self { peer_buf_alloc: 0, peer_fwd_cnt: 0, sent: 0 }
    }

    /// Bytes sent that the DPU has not taken yet.
    pub fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_fwd_cnt)
    }

    /// The DPU's receive buffer, as it said last.
    pub fn peer_buffer(&self) -> u32 {
        self.peer_buf_alloc
    }

    /// Bytes that may be sent now.
    pub fn available(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.in_flight())
    }

    /// Records `bytes` as sent. Callers send at most [`SendCredit::available`].
    pub fn sent(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.available());
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Takes the numbers that every packet of the DPU carries.
    ///
    /// # Errors
    /// [`BadCredit`] when `fwd_cnt` acknowledges what was never sent; nothing changes then.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), BadCredit> {
        let claimed = fwd_cnt.wrapping_sub(self.peer_fwd_cnt);
        let in_flight = self.in_flight();
        if claimed > in_flight {
            return Err(BadCredit { claimed, in_flight });
        }
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = fwd_cnt;
        Ok(())
    }
}

impl Default for SendCredit {
    fn default() -> Self {
        Self::new()
    }
}

/// DPU to host: our buffer, and what the DPU knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveWindow {
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    told_buf_alloc: u32,
    /// The DPU's own receive buffer. Linux since CVE-2026-23086 sends no more than this ahead, whatever it
    /// is offered.
    self_limit: u32,
    /// It did send more: it has no such limit.
    unlimited: bool,
}

impl ReceiveWindow {
    /// A window of `buf_alloc` bytes that the DPU has not been told of.
    pub fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            told_buf_alloc: 0,
            self_limit: u32::MAX,
            unlimited: false,
        }
    }

    /// Takes the DPU's own receive buffer, which may be all that it sends ahead.
    pub fn set_self_limit(&mut self, buf_alloc: u32) {
        self.self_limit = buf_alloc;
    }

    /// Bytes received and not yet forwarded to the host socket.
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// The window's size.
    pub fn size(&self) -> u32 {
        self.buf_alloc
    }

    /// Takes `bytes` from the DPU; false when they overrun the window (the DPU broke the protocol).
    #[must_use]
    pub fn receive(&mut self, bytes: u32) -> bool {
        if bytes > self.buf_alloc - self.buffered() {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        self.unlimited |= self.unconfirmed() > self.self_limit;
        true
    }

    /// Bytes received since what the DPU was told last.
    fn unconfirmed(&self) -> u32 {
        self.received.wrapping_sub(self.told_forwarded)
    }

    /// What the DPU sends ahead at most: less than the window where it limits itself.
    fn usable(&self) -> u32 {
        if self.unlimited { self.buf_alloc } else { self.buf_alloc.min(self.self_limit) }
    }

    /// Records that the host socket took `bytes` of what was buffered.
    pub fn forward(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.buffered());
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Makes the window smaller, if the DPU does not know of it yet.
    pub fn limit(&mut self, buf_alloc: u32) {
        if self.told_buf_alloc == 0 {
            self.buf_alloc = self.buf_alloc.min(buf_alloc);
        }
    }

    /// Makes the window larger. It never shrinks: bytes may be on their way.
    pub fn grow(&mut self, buf_alloc: u32) {
        self.buf_alloc = self.buf_alloc.max(buf_alloc);
    }

    /// Bytes the DPU may still send as far as it knows.
    pub fn known_free(&self) -> u32 {
        self.told_buf_alloc.min(self.usable()).saturating_sub(self.unconfirmed())
    }

    /// Whether a credit update of its own is worth a packet: the DPU knows of a quarter of what it could
    /// use at most, and telling it would give it at least another quarter.
    pub fn update_is_due(&self) -> bool {
        let usable = self.usable();
        let (free, known) = (usable.saturating_sub(self.buffered()), self.known_free());
        known <= usable / 4 && free.saturating_sub(known) > usable.div_ceil(4).saturating_sub(1)
    }

    /// `(buf_alloc, fwd_cnt)` for the next packet to the DPU, which then knows them.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told_forwarded = self.forwarded;
        self.told_buf_alloc = self.buf_alloc;
        (self.buf_alloc, self.forwarded)
    }
}

#[cfg(test)]
impl SendCredit {
    pub(super) fn start_at(&mut self, count: u32) {
        (self.sent, self.peer_fwd_cnt) = (count, count);
    }
}

#[cfg(test)]
impl ReceiveWindow {
    pub(super) fn start_at(&mut self, count: u32) {
        (self.received, self.forwarded, self.told_forwarded) = (count, count, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_shrunk_buffer_gives_no_credit_instead_of_four_gigabytes() {
        let mut credit = SendCredit::new();
        credit.update(4096, 0).expect("first update");
        credit.sent(1000);
        credit.update(10, 0).expect("shrinking is legal");
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn the_largest_buffer_can_be_filled_and_not_overrun() {
        let mut credit = SendCredit::new();
        credit.update(u32::MAX, 0).expect("first update");
        credit.sent(u32::MAX);
        assert_eq!((credit.in_flight(), credit.available()), (u32::MAX, 0));
        credit.update(u32::MAX, u32::MAX).expect("all of it was read");
        assert_eq!((credit.in_flight(), credit.available()), (0, u32::MAX));
    }

    #[test]
    fn acknowledging_the_unsent_is_refused_and_changes_nothing() {
        let mut credit = SendCredit::new();
        credit.update(4096, 0).expect("first update");
        credit.sent(100);
        let before = credit;
        assert_eq!(credit.update(4096, 101), Err(BadCredit { claimed: 101, in_flight: 100 }));
        assert_eq!(credit.update(4096, u32::MAX), Err(BadCredit { claimed: u32::MAX, in_flight: 100 }));
        assert_eq!(credit, before);
    }

    #[test]
    fn every_start_near_the_wrap_behaves_as_at_zero() {
        for start in (0..8).map(|back| 0u32.wrapping_sub(back)).chain([0, 1, u32::MAX / 2, 1 << 31]) {
            let mut credit = SendCredit { peer_buf_alloc: 16, peer_fwd_cnt: start, sent: start };
            let mut window = ReceiveWindow::new(16);
            window.tell();
            window.start_at(start);
            for step in 1..=64u32 {
                assert_eq!(credit.available(), 16);
                credit.sent(5);
                assert!(window.receive(5));
                assert!(!window.receive(12));
                window.forward(5);
                let (buf_alloc, fwd_cnt) = window.tell();
                assert_eq!(fwd_cnt, start.wrapping_add(5 * step));
                credit.update(buf_alloc, fwd_cnt).expect("an honest update");
                assert_eq!(credit.in_flight(), 0);
            }
        }
    }

    #[test]
    fn a_window_shrinks_only_while_the_dpu_does_not_know_it() {
        let mut window = ReceiveWindow::new(1000);
        window.limit(600);
        assert_eq!(window.tell(), (600, 0));
        window.limit(10);
        assert_eq!(window.size(), 600);
    }

    #[test]
    fn a_bulk_sender_costs_few_credit_updates() {
        let mut window = ReceiveWindow::new(1 << 20);
        window.tell();
        let mut updates = 0;
        for _ in 0..1024 {
            assert!(window.known_free() >= MAX_PACKET, "the sender stalls");
            assert!(window.receive(MAX_PACKET));
            window.forward(MAX_PACKET);
            if window.update_is_due() {
                window.tell();
                updates += 1;
            }
        }
        assert!(updates <= 4 * 64, "{updates} updates for 64 MiB");
    }

    const MAX_PACKET: u32 = crate::packet::MAX_PAYLOAD;

    proptest! {
        #[test]
        fn both_halves_agree_and_nothing_overruns(start in any::<u32>(), steps in proptest::collection::vec((0u32..5000, 0u32..5000, any::<bool>()), 1..200)) {
            let size = 4096;
            let mut credit = SendCredit { peer_buf_alloc: size, peer_fwd_cnt: start, sent: start };
            let mut window = ReceiveWindow::new(size);
            window.tell();
            window.start_at(start);
            let (mut sent, mut taken) = (0u64, 0u64);
            for (send, take, tell) in steps {
                let send = send.min(credit.available());
                credit.sent(send);
                prop_assert!(window.receive(send), "the sender overran the receiver");
                sent += u64::from(send);
                let take = take.min(window.buffered());
                window.forward(take);
                taken += u64::from(take);
                prop_assert_eq!(u64::from(window.buffered()), sent - taken);
                if tell {
                    let (buf_alloc, fwd_cnt) = window.tell();
                    prop_assert!(credit.update(buf_alloc, fwd_cnt).is_ok());
                    prop_assert_eq!(credit.available(), window.known_free());
                }
            }
        }

        #[test]
        fn no_sender_stalls_whatever_it_limits_itself_to(
            window in 1u32..5000,
            grown in 1u32..20_000,
            own in 1u32..20_000,
            limited in any::<bool>(),
            packets in proptest::collection::vec((1u32..3000, 1u32..3000), 1..300),
        ) {
            let mut credit = SendCredit::new();
            let mut receiver = ReceiveWindow::new(window);
            receiver.set_self_limit(own);
            let (buf_alloc, fwd_cnt) = receiver.tell();
            prop_assert!(credit.update(buf_alloc, fwd_cnt).is_ok());
            for (step, (send, take)) in packets.into_iter().enumerate() {
                if step == 20 {
                    receiver.grow(grown);
                }
                let own_room = own.saturating_sub(credit.in_flight());
                let room = if limited { credit.available().min(own_room) } else { credit.available() };
                let send = send.min(room);
                credit.sent(send);
                prop_assert!(receiver.receive(send));
                receiver.forward(take.min(receiver.buffered()));
                if receiver.update_is_due() {
                    let (buf_alloc, fwd_cnt) = receiver.tell();
                    prop_assert!(credit.update(buf_alloc, fwd_cnt).is_ok());
                }
                if receiver.buffered() == 0 {
                    let own_room = own.saturating_sub(credit.in_flight());
                    let room = if limited { credit.available().min(own_room) } else { credit.available() };
                    prop_assert!(room > 0, "nothing is buffered and the sender waits");
                }
            }
        }

        #[test]
        fn hostile_updates_never_give_more_than_was_offered(updates in proptest::collection::vec((any::<u32>(), any::<u32>()), 1..100)) {
            let mut credit = SendCredit::new();
            for (buf_alloc, fwd_cnt) in updates {
                let _ = credit.update(buf_alloc, fwd_cnt);
                let (available, before) = (credit.available(), credit.in_flight());
                let most = credit.peer_buf_alloc.max(before);
                prop_assert!(u64::from(before) + u64::from(available) <= u64::from(most));
                credit.sent(available / 2);
                prop_assert_eq!(credit.in_flight(), before + available / 2);
            }
        }
    }
}
