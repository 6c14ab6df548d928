//! Ctrl-C and termination: the first time is a request, the second an order.

use crate::out;
use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a shell expects of a program that ended by Ctrl-C.
pub(crate) const INTERRUPTED: i32 = 130;

/// A flag that the first SIGINT or SIGTERM sets. The second ends the process at once, without running anything else.
///
/// # Errors
/// When the handlers cannot be set up.
pub(crate) fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    on_signal(move || {
        if flag.swap(true, Ordering::Relaxed) {
            low_level::exit(INTERRUPTED);
        }
        out::note("finishing the step, saving; press Ctrl-C again to leave at once");
    })?;
    Ok(stop)
}

/// A flag that Ctrl-C sets while `busy` is set; otherwise it ends the process.
///
/// # Errors
/// When the handlers cannot be set up.
pub(crate) fn stop_while(busy: Arc<AtomicBool>) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    on_signal(move || {
        if !busy.load(Ordering::Relaxed) {
            low_level::exit(INTERRUPTED);
        }
        flag.store(true, Ordering::Relaxed);
    })?;
    Ok(stop)
}

fn on_signal(mut action: impl FnMut() + Send + 'static) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot set up the handling of Ctrl-C")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().for_each(|_| action()))
        .context("cannot set up the handling of Ctrl-C")?;
    Ok(())
}
