//! Which connections have something for the DPU, in the order in which they get their turn.
//!
//! A connection stands in the queue at most once, so the queue never holds more entries than there
//! are connections. One turn moves at most one batch of the connection's bytes; what is left goes to
//! the end of the queue: a busy channel delays the others by one batch, never more.
#![forbid(unsafe_code)]

use std::collections::{HashSet, VecDeque};

use super::table::Token;

/// The queue.
#[derive(Debug, Default)]
pub struct RxQueue {
    order: VecDeque<Token>,
    queued: HashSet<Token>,
}

impl RxQueue {
    /// Puts a connection at the end, unless it stands in the queue already.
    pub fn push(&mut self, token: Token) {
        if self.queued.insert(token) {
            self.order.push_back(token);
        }
    }

    /// Takes the connection whose turn it is.
    pub fn pop(&mut self) -> Option<Token> {
        let token = self.order.pop_front()?;
        self.queued.remove(&token);
        Some(token)
    }

    /// Gives a turn back that could not be used (the DPU has no buffers).
    pub fn unpop(&mut self, token: Token) {
        if self.queued.insert(token) {
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
    fn a_turn_that_was_given_back_comes_first() {
        let mut queue = RxQueue::default();
        queue.push(token(1));
        queue.push(token(2));
        let turn = queue.pop().expect("a turn");
        queue.unpop(turn);
        assert_eq!(queue.pop(), Some(token(1)));
    }
}
