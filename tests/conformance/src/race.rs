//! Something happens again and again while an attack runs.

use std::sync::atomic::{AtomicBool, Ordering};

/// One step of an opponent, repeated as fast as it goes.
pub type Opponent<'a> = Box<dyn FnMut() + Send + 'a>;

/// Sets the flag even if the attack fails by a panic: the opponents must end for the failure to be seen.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `attack` while every opponent repeats its step on a thread of its own.
pub fn race<T>(opponents: Vec<Opponent<'_>>, attack: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for mut opponent in opponents {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    opponent();
                }
            });
        }
        attack()
    })
}
