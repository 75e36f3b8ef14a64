//! The connections of one DPU: by token (what epoll and the queues know) and by address pair (what a
//! packet names).
//!
//! A token holds the slot's generation, so that an event that was queued for a connection that has
//! ended since cannot reach the next one in the same slot. The table has a fixed limit; ports on the
//! host's side that this side assigns are unique among the live connections.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use crate::host::hello::MAX_ASSIGNED_PORT;
use crate::packet::{HOST_CID, Kind};

/// Lowest port this side assigns: below are the privileged ones.
const FIRST_ASSIGNED_PORT: u32 = 1024;

/// Names one connection for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token {
    /// Place in the table.
    pub slot: u32,
    /// How often the place was reused.
    pub generation: u32,
}

/// What a packet of the DPU names a connection by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// Context id of the other side as the DPU sees it: the host, or a sibling DPU.
    pub peer_cid: u64,
    /// Port on the DPU.
    pub dpu_port: u32,
    /// Port on the other side.
    pub host_port: u32,
    /// Socket type.
    pub kind: Kind,
}

/// Why a connection was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The limit is reached.
    #[error("the DPU has {0} connections, the most it may have")]
    Full(usize),
    /// The pair is in use.
    #[error("the port pair is in use")]
    InUse,
    /// No port is left to assign.
    #[error("all host ports are assigned")]
    NoPort,
}

#[derive(Debug)]
struct Slot<C> {
    generation: u32,
    entry: Option<(Pair, C)>,
}

/// The table; `C` is what is kept per connection.
#[derive(Debug)]
pub struct Table<C> {
    slots: Vec<Slot<C>>,
    free: Vec<u32>,
    by_pair: HashMap<Pair, Token>,
    limit: usize,
    next_port: u32,
}

impl<C> Table<C> {
    /// An empty table for at most `limit` connections.
    pub fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_pair: HashMap::new(),
            limit,
            next_port: FIRST_ASSIGNED_PORT,
        }
    }

    /// Live connections, those that lost their pair included.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a connection.
    ///
    /// # Errors
    /// [`TableError::Full`], [`TableError::InUse`].
    pub fn insert(&mut self, pair: Pair, connection: C) -> Result<Token, TableError> {
        if self.by_pair.contains_key(&pair) {
            return Err(TableError::InUse);
        }
        if self.len() >= self.limit {
            return Err(TableError::Full(self.limit));
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.slots.len()).map_err(|_| TableError::Full(self.limit))?;
                self.slots.push(Slot { generation: 0, entry: None });
                slot
            }
        };
        let place = &mut self.slots[slot as usize];
        place.entry = Some((pair, connection));
        let token = Token { slot, generation: place.generation };
        self.by_pair.insert(pair, token);
        Ok(token)
    }

    /// A host port for a connection to `dpu_port` that no live connection has. Ports are handed out in
    /// turn, so that one that was just given up is not taken again at once.
    ///
    /// # Errors
    /// [`TableError::NoPort`].
    pub fn assign_port(&mut self, dpu_port: u32, kind: Kind) -> Result<u32, TableError> {
        let peer_cid = HOST_CID;
        for _ in FIRST_ASSIGNED_PORT..=MAX_ASSIGNED_PORT {
            let port = self.next_port;
            self.next_port = if port == MAX_ASSIGNED_PORT { FIRST_ASSIGNED_PORT } else { port + 1 };
            if !self.by_pair.contains_key(&Pair { peer_cid, dpu_port, host_port: port, kind }) {
                return Ok(port);
            }
        }
        Err(TableError::NoPort)
    }

    /// The connection of a pair.
    pub fn find(&self, pair: Pair) -> Option<Token> {
        self.by_pair.get(&pair).copied()
    }

    /// The connection of a token, if it still lives.
    pub fn get_mut(&mut self, token: Token) -> Option<(Pair, &mut C)> {
        let place = self.slots.get_mut(token.slot as usize)?;
        if place.generation != token.generation {
            return None;
        }
        place.entry.as_mut().map(|(pair, connection)| (*pair, connection))
    }

    /// Takes a connection out.
    pub fn remove(&mut self, token: Token) -> Option<(Pair, C)> {
        let place = self.slots.get_mut(token.slot as usize)?;
        if place.generation != token.generation {
            return None;
        }
        let (pair, connection) = place.entry.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(token.slot);
        // A draining connection may have lost its pair to a successor.
        if self.by_pair.get(&pair) == Some(&token) {
            self.by_pair.remove(&pair);
        }
        Some((pair, connection))
    }

    /// Frees the pair of a connection that the DPU knows no more, while the connection lives on.
    pub fn release_pair(&mut self, token: Token) {
        if let Some((pair, _)) = self.get_mut(token)
            && self.by_pair.get(&pair) == Some(&token)
        {
            self.by_pair.remove(&pair);
        }
    }

    /// The pair of a connection, if the DPU still knows it by that.
    pub fn pair_of(&self, token: Token) -> Option<Pair> {
        let place = self.slots.get(token.slot as usize)?;
        let (pair, _) = place.entry.as_ref().filter(|_| place.generation == token.generation)?;
        (self.by_pair.get(pair) == Some(&token)).then_some(*pair)
    }

    /// All live tokens.
    pub fn tokens(&self) -> impl Iterator<Item = Token> {
        self.slots
            .iter()
            .zip(0u32..)
            .filter(|(place, _)| place.entry.is_some())
            .map(|(place, slot)| Token { slot, generation: place.generation })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(dpu_port: u32) -> Pair {
        Pair { peer_cid: HOST_CID, dpu_port, host_port: 22, kind: Kind::Stream }
    }

    #[test]
    fn an_old_token_does_not_reach_the_next_connection_in_its_slot() {
        let mut table = Table::new(4);
        let old = table.insert(pair(1), "old").expect("room");
        table.remove(old);
        let new = table.insert(pair(2), "new").expect("room");
        assert_eq!(new.slot, old.slot);
        assert!(table.get_mut(old).is_none());
        assert!(table.remove(old).is_none());
        assert_eq!(table.get_mut(new), Some((pair(2), &mut "new")));
    }

    #[test]
    fn the_limit_holds_and_a_place_comes_free() {
        let mut table = Table::new(2);
        let first = table.insert(pair(1), ()).expect("room");
        table.insert(pair(2), ()).expect("room");
        assert_eq!(table.insert(pair(3), ()), Err(TableError::Full(2)));
        table.remove(first);
        assert!(table.insert(pair(3), ()).is_ok());
        assert_eq!(table.tokens().count(), 2);
    }

    #[test]
    fn a_pair_is_taken_once() {
        let mut table = Table::new(2);
        table.insert(pair(1), ()).expect("room");
        assert_eq!(table.insert(pair(1), ()), Err(TableError::InUse));
        assert!(
            table.insert(Pair { kind: Kind::SeqPacket, ..pair(1) }, ()).is_ok(),
            "another socket type is another pair"
        );
    }

    #[test]
    fn assigned_ports_wrap_and_skip_what_is_in_use() {
        let mut table = Table::new(10);
        let first = table.assign_port(5, Kind::Stream).expect("a port");
        let pair = Pair { peer_cid: HOST_CID, dpu_port: 5, host_port: first, kind: Kind::Stream };
        table.insert(pair, ()).expect("room");
        let mut seen = 0u32;
        loop {
            let port = table.assign_port(5, Kind::Stream).expect("a port");
            assert_ne!(port, first);
            assert!((FIRST_ASSIGNED_PORT..=MAX_ASSIGNED_PORT).contains(&port));
            seen += 1;
            if port == MAX_ASSIGNED_PORT {
                break;
            }
        }
        assert_eq!(seen, MAX_ASSIGNED_PORT - first);
        assert_eq!(table.assign_port(5, Kind::Stream), Ok(first + 1));
    }
}
