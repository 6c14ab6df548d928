//! `lora launch`: several processes of this machine that train together.

use crate::failure::{USAGE, usage};
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(20);
/// How long the others may take to leave by themselves when one has failed, before they are told to, and then made to.
const GRACE: Duration = Duration::from_secs(10);

/// The flags of `lora launch`; those of `lora train` follow.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Processes
    #[arg(short = 'n', long = "ranks", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ranks: u32,
    /// Port of this machine at which they meet; a free one when absent
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// What `lora train` is started with
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "TRAIN")]
    train: Vec<OsString>,
}

/// Runs the verb.
///
/// # Errors
/// When a process cannot be started, or the first that failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot set up the handling of Ctrl-C")?;
    let mut ranks = start(args)?;
    let (mut failed, mut pressed) = (None, Pressed::default());
    while ranks.iter().any(|rank| rank.ended.is_none()) {
        for signal in signals.pending() {
            tell(&ranks, if signal == SIGINT { Signal::INT } else { Signal::TERM });
        }
        for rank in ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
            rank.ended = rank.child.try_wait().with_context(|| format!("rank {}", rank.number))?;
            if let Some(status) = rank.ended.filter(|status| !status.success()) {
                failed.get_or_insert((rank.number, status, Instant::now()));
            }
        }
        if let Some((_, _, since)) = failed {
            pressed.press(&ranks, since.elapsed());
        }
        thread::sleep(LOOK);
    }
    match failed {
        None => Ok(()),
        Some((rank, status, _)) => Err(ended(rank, status)),
    }
}

/// A process of the run.
struct Rank {
    number: u32,
    child: Child,
    ended: Option<ExitStatus>,
}

fn start(args: &Args) -> Result<Vec<Rank>> {
    let port = match args.port {
        Some(port) => port,
        None => free_port().context("no port of this machine is free")?,
    };
    let program = std::env::current_exe().context("where the program is")?;
    let cores = thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let mut ranks = Vec::new();
    for number in 0..args.ranks {
        let mut command = Command::new(&program);
        command.arg("train").args(&args.train);
        for (variable, value) in [
            ("RANK", number.to_string()),
            ("LOCAL_RANK", number.to_string()),
            ("WORLD_SIZE", args.ranks.to_string()),
            ("LOCAL_WORLD_SIZE", args.ranks.to_string()),
            ("MASTER_ADDR", "127.0.0.1".into()),
            ("MASTER_PORT", port.to_string()),
        ] {
            command.env(variable, value);
        }
        // The machine's threads are shared, unless the user has said how.
        for threads in ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"] {
            if std::env::var_os(threads).is_none() {
                command.env(threads, (cores / args.ranks).max(1).to_string());
            }
        }
        // In a group of its own a process hears of Ctrl-C from here, once.
        match command.process_group(0).spawn() {
            Ok(child) => ranks.push(Rank { number, child, ended: None }),
            Err(error) => {
                tell(&ranks, Signal::KILL);
                return Err(error).with_context(|| format!("rank {number} cannot be started"));
            }
        }
    }
    Ok(ranks)
}

/// What was done so far to make the others leave.
#[derive(Default)]
struct Pressed {
    told: bool,
    made: bool,
}

impl Pressed {
    fn press(&mut self, ranks: &[Rank], since: Duration) {
        if since > GRACE && !self.told {
            self.told = true;
            tell(ranks, Signal::TERM);
        }
        if since > 2 * GRACE && !self.made {
            self.made = true;
            tell(ranks, Signal::KILL);
        }
    }
}

/// Sends a signal to those that are still there.
fn tell(ranks: &[Rank], signal: Signal) {
    for rank in ranks.iter().filter(|rank| rank.ended.is_none()) {
        if let Some(pid) = i32::try_from(rank.child.id()).ok().and_then(Pid::from_raw) {
            // One that has just gone needs no signal.
            let _ = kill_process(pid, signal);
        }
    }
}

fn ended(rank: u32, status: ExitStatus) -> anyhow::Error {
    match (status.code(), status.signal()) {
        (Some(code), _) if code == i32::from(USAGE) => usage(format!("rank {rank} ended with exit code {code}")),
        (Some(code), _) => anyhow::anyhow!("rank {rank} ended with exit code {code}"),
        (None, Some(signal)) => anyhow::anyhow!("rank {rank} was ended by signal {signal}"),
        (None, None) => anyhow::anyhow!("rank {rank} ended"),
    }
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
