//! Deadlines of connections in the order in which they fall due. One timer serves them all.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};

use super::table::Token;

/// The deadlines, at most one per connection.
#[derive(Debug, Default)]
pub struct Deadlines {
    order: BTreeSet<(u64, Token)>,
    by_token: HashMap<Token, u64>,
}

impl Deadlines {
    /// Sets, moves or (with `None`) drops the deadline of a connection.
    pub fn set(&mut self, token: Token, due: Option<u64>) {
        let earlier = match due {
            Some(due) => self.by_token.insert(token, due),
            None => self.by_token.remove(&token),
        };
        if earlier == due {
            return;
        }
        if let Some(earlier) = earlier {
            self.order.remove(&(earlier, token));
        }
        if let Some(due) = due {
            self.order.insert((due, token));
        }
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<u64> {
        self.order.first().map(|(due, _)| *due)
    }

    /// Takes one deadline that has passed at `now`.
    pub fn pop(&mut self, now: u64) -> Option<Token> {
        let (due, token) = *self.order.first()?;
        if due > now {
            return None;
        }
        self.order.pop_first();
        self.by_token.remove(&token);
        Some(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_in_order_and_only_once() {
        let (a, b) = (Token { slot: 1, generation: 0 }, Token { slot: 2, generation: 0 });
        let mut deadlines = Deadlines::default();
        deadlines.set(a, Some(20));
        deadlines.set(b, Some(10));
        assert_eq!(deadlines.next(), Some(10));
        assert_eq!(deadlines.pop(9), None);
        assert_eq!(deadlines.pop(20), Some(b));
        assert_eq!(deadlines.pop(20), Some(a));
        assert_eq!(deadlines.pop(20), None);
    }

    #[test]
    fn a_moved_deadline_leaves_no_trace() {
        let a = Token { slot: 1, generation: 0 };
        let mut deadlines = Deadlines::default();
        deadlines.set(a, Some(10));
        deadlines.set(a, Some(30));
        assert_eq!(deadlines.pop(10), None);
        deadlines.set(a, None);
        assert_eq!(deadlines.next(), None);
    }
}
