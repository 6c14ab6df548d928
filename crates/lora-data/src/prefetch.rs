//! What is needed next is made while what is there is used.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

/// A thread that makes items ahead, a few at most, and gives them out in the order in which it makes them.
#[derive(Debug)]
pub struct Prefetch<T> {
    /// None once this is being dropped.
    items: Option<Receiver<T>>,
    worker: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Starts the thread. It calls `make` until that gives nothing any more, and rests while `ahead` items wait, one more
    /// being made.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub fn start(ahead: usize, mut make: impl FnMut() -> Option<T> + Send + 'static) -> std::io::Result<Self> {
        let (sender, items) = sync_channel(ahead);
        let worker = Builder::new().name("prefetch".to_owned()).spawn(move || {
            while let Some(item) = make() {
                // Nobody waits for it any more.
                if sender.send(item).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { items: Some(items), worker: Some(worker) })
    }

    /// The next item, when it is made; none once the thread has ended, whatever ended it.
    pub fn next_item(&mut self) -> Option<T> {
        self.items.as_ref()?.recv().ok()
    }
}

/// Ends the thread and waits for the item that it is at.
impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        // Without a receiver the thread cannot wait for room.
        self.items = None;
        if let Some(worker) = self.worker.take() {
            // A panic there was said by an item that is missing.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts up to a number, and tells how far it came and whether it was given up.
    fn counter(to: usize) -> (Arc<AtomicUsize>, impl FnMut() -> Option<usize> + Send + 'static) {
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        (made, move || Some(count.fetch_add(1, Ordering::SeqCst)).filter(|item| *item < to))
    }

    #[test]
    fn items_come_in_order_and_end() {
        for ahead in [0, 1, 3] {
            let mut items = Prefetch::start(ahead, counter(100).1).unwrap();
            let all: Vec<usize> = std::iter::from_fn(|| items.next_item()).collect();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
            assert_eq!(items.next_item(), None);
        }
    }

    #[test]
    fn it_never_runs_further_ahead_and_ends_when_it_is_dropped() {
        let (made, make) = counter(usize::MAX);
        let mut items = Prefetch::start(2, make).unwrap();
        for item in 0..50 {
            assert_eq!(items.next_item(), Some(item));
            // Those taken, two that wait, one that was made and does not fit.
            assert!(made.load(Ordering::SeqCst) <= item + 1 + 2 + 1);
        }
        drop(items);
        assert_eq!(Arc::strong_count(&made), 1, "the thread has ended and let go of what it had");
    }

    #[test]
    fn a_panic_is_an_end() {
        let mut left = 2;
        let make = move || {
            left -= 1;
            assert!(left > 0, "the maker breaks down");
            Some(left)
        };
        let mut items = Prefetch::start(4, make).unwrap();
        assert_eq!((items.next_item(), items.next_item()), (Some(1), None));
    }
}
