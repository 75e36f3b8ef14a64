//! How many descriptors an export may hold for the DPU.
//!
//! Inodes and open files draw on one budget. It lies below the process's limit, so that the daemon
//! itself never runs out: what a request needs only while it runs is not counted. When the budget is
//! used up an inode gives its descriptor back (see [`super::inode`]) or the request gets `ENFILE`.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A limit and what is used of it.
#[derive(Debug)]
pub(super) struct FdBudget {
    limit: usize,
    used: AtomicUsize,
}

impl FdBudget {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    /// Room for one descriptor, until the token is dropped.
    pub(super) fn take(self: &Arc<Self>) -> Option<FdToken> {
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                (used < self.limit).then_some(used + 1)
            })
            .ok()?;
        Some(FdToken(Arc::clone(self)))
    }

    /// Descriptors in use.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Room for one descriptor in the budget.
#[derive(Debug)]
pub(super) struct FdToken(Arc<FdBudget>);

impl Drop for FdToken {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An open descriptor together with its place in the budget, which is given back after the close.
#[derive(Debug)]
pub(super) struct BudgetedFd {
    fd: OwnedFd,
    token: Option<FdToken>,
}

impl BudgetedFd {
    pub(super) fn new(fd: OwnedFd, token: FdToken) -> Self {
        Self { fd, token: Some(token) }
    }

    /// A descriptor that the budget does not know: one per export or mount, not per file.
    pub(super) fn uncounted(fd: OwnedFd) -> Self {
        Self { fd, token: None }
    }

    /// Whether it was made by [`BudgetedFd::uncounted`].
    pub(super) fn is_uncounted(&self) -> bool {
        self.token.is_none()
    }
}

impl AsFd for BudgetedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_gives_back_what_tokens_drop() {
        let budget = FdBudget::new(2);
        let first = budget.take();
        let second = budget.take();
        assert!(first.is_some() && second.is_some());
        assert!(budget.take().is_none());
        drop(first);
        assert_eq!(budget.used(), 1);
        assert!(budget.take().is_some());
    }
}
