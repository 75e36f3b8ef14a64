//! Which connections have something for the DPU, in the order in which they get their turn.
//!
//! A connection stands in the queue at most once; one that has ended leaves its entry behind until its
//! turn comes. One turn moves at most one batch of the connection's bytes; what is left goes to
//! the end of the queue: a busy channel delays the others by one batch, never more.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::table::Token;

/// The queue.
#[derive(Debug, Default)]
pub struct RxQueue {
    order: VecDeque<Token>,
    /// By slot: the generation that stands in the queue.
    queued: Vec<Option<u32>>,
}

impl RxQueue {
    /// Puts a connection at the end, unless it stands in the queue already.
    pub fn push(&mut self, token: Token) {
        if self.enter(token) {
            self.order.push_back(token);
        }
    }

    /// Marks a connection as queued; false when it was.
    fn enter(&mut self, token: Token) -> bool {
        let slot = token.slot as usize;
        if slot >= self.queued.len() {
            self.queued.resize(slot + 1, None);
        }
        // A token of an earlier generation may still stand in the queue; its turn finds nobody.
        self.queued[slot].replace(token.generation) != Some(token.generation)
    }

    /// Takes the connection whose turn it is.
    pub fn pop(&mut self) -> Option<Token> {
        let token = self.order.pop_front()?;
        if let Some(queued) = self.queued.get_mut(token.slot as usize)
            && *queued == Some(token.generation)
        {
            *queued = None;
        }
        Some(token)
    }

    /// Gives a turn back that could not be used (the DPU has no buffers).
    pub fn unpop(&mut self, token: Token) {
        if self.enter(token) {
            self.order.push_front(token);
        }
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Connections that wait.
    pub fn len(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(slot: u32) -> Token {
        Token { slot, generation: 0 }
    }

    #[test]
    fn everyone_gets_a_turn_before_anyone_gets_two() {
        let mut queue = RxQueue::default();
        for slot in [1, 2, 3, 1, 1] {
            queue.push(token(slot));
        }
        assert_eq!(queue.len(), 3);
        let first = queue.pop().expect("a turn");
        queue.push(first);
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop()).map(|token| token.slot).collect();
        assert_eq!(order, [2, 3, 1]);
    }

    #[test]
    fn a_successor_in_the_same_slot_gets_its_own_turn() {
        let mut queue = RxQueue::default();
        let successor = Token { slot: 1, generation: 1 };
        queue.push(token(1));
        queue.push(successor);
        queue.push(successor);
        assert_eq!(queue.pop(), Some(token(1)));
        queue.push(successor);
        assert_eq!(queue.pop(), Some(successor));
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn a_turn_that_was_given_back_comes_first() {
        let mut queue = RxQueue::default();
        queue.push(token(1));
        queue.push(token(2));
        let turn = queue.pop().expect("a turn");
        queue.unpop(turn);
        assert_eq!(queue.pop(), Some(token(1)));
    }
}
