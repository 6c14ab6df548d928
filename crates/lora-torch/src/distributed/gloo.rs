//! Processes by libtorch's ProcessGroupGloo, and with the feature `nccl` by its ProcessGroupNCCL between CUDA devices.

use super::heart::{Heart, silent};
use super::{Collective, Launch, Transfer, within};
use crate::error::{Error, Result};
use crate::ffi::Member;
use std::ffi::CString;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Between two looks at who has come.
const LOOK: Duration = Duration::from_millis(50);

/// A process's membership of a group that is connected by TCP.
#[derive(Debug)]
pub struct Gloo {
    launch: Launch,
    /// Taken out when it is closed.
    member: Option<Arc<Member>>,
    heart: Option<Heart>,
    /// One exchange at a time.
    turn: Mutex<()>,
    /// The first error: a group that broke is of no further use.
    broken: AtomicBool,
    said: Mutex<Vec<u32>>,
}

impl Gloo {
    /// Meets the others. `timeout` is how long it waits for them here, and for an answer of any of them later.
    ///
    /// # Errors
    /// [`Error::StoreTaken`], [`Error::StoreNotReached`], [`Error::Missing`], or what libtorch reports.
    pub fn connect(launch: &Launch, timeout: Duration) -> Result<Self> {
        Member::available()?;
        let deadline = Instant::now() + timeout;
        let meeting = {
            let launch = launch.clone();
            move || Self::meet(&launch, deadline, timeout)
        };
        // The others have their time to come, and then the group its own to be connected.
        match within(2 * timeout + LOOK, meeting) {
            Some(met) => met,
            None => Err(not_reached(launch, timeout, "it accepted the connection and then gave no answer".into())),
        }
    }

    fn meet(launch: &Launch, deadline: Instant, timeout: Duration) -> Result<Self> {
        let hosts = launch.hosts && launch.rank == 0;
        let store = match hosts {
            true => {
                open(launch, true, timeout).map_err(|e| Error::StoreTaken { port: launch.port, message: said(&e) })?
            }
            false => {
                reach(launch, deadline, timeout)?;
                open(launch, false, timeout)?
            }
        };
        let member = Arc::new(store);
        let heart = Heart::start(open(launch, false, timeout)?, launch.rank);
        let heart = heart.map_err(|e| Error::Shim { op: "signs of life", message: e.to_string() })?;
        assemble(launch, &member, deadline, timeout)?;
        member.open_group(whole(launch.rank), whole(launch.world), millis(timeout))?;
        Ok(Self {
            launch: launch.clone(),
            member: Some(member),
            heart: Some(heart),
            turn: Mutex::new(()),
            broken: AtomicBool::new(false),
            said: Mutex::new(Vec::new()),
        })
    }

    /// Runs an exchange. Where it fails, the processes are found that give no sign of life.
    fn exchange<T>(&self, run: impl FnOnce(&Member) -> Result<T>) -> Result<T> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(member) = &self.member else { return Err(self.lost("it was closed")) };
        if self.broken.load(Ordering::Relaxed) {
            return Err(self.lost("it was broken off before"));
        }
        run(member).map_err(|error| {
            self.broken.store(true, Ordering::Relaxed);
            let lost = silent(member, self.launch.world);
            // Without an answer of the store, its holder is gone.
            let lost = lost.unwrap_or_else(|| if self.launch.hosts { vec![0] } else { Vec::new() });
            *self.said.lock().unwrap_or_else(PoisonError::into_inner) = lost;
            self.lost(&said(&error))
        })
    }

    fn lost(&self, message: &str) -> Error {
        let Launch { rank, world, .. } = self.launch;
        let lost = self.said.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Error::Lost { rank, world, address: self.launch.place(), lost, message: message.into() }
    }

    /// The number of another process.
    fn peer(&self, peer: u32) -> Result<i32> {
        let Launch { rank, world, .. } = self.launch;
        if peer == rank || peer >= world { Err(Error::NoPeer { peer, rank, world }) } else { Ok(whole(peer)) }
    }

    /// Runs an exchange of a tensor on the host, or on a CUDA device where NCCL was built in; that of another device goes through a
    /// copy on the host.
    fn exchange_tensor(&self, tensor: &mut Tensor, run: impl FnOnce(&Member, &mut Tensor) -> Result<()>) -> Result<()> {
        if !tensor.is_contiguous() {
            return Err(Error::shape("exchange", "tensor", "contiguous", tensor.size()));
        }
        let as_it_is = match tensor.device() {
            Device::Cpu => true,
            Device::Cuda(_) => Member::takes_cuda(),
            _ => false,
        };
        if as_it_is {
            return self.exchange(|member| run(member, tensor));
        }
        let mut host = tensor.f_to_device(Device::Cpu)?;
        self.exchange(|member| run(member, &mut host))?;
        tensor.f_copy_(&host)?;
        Ok(())
    }
}

impl Collective for Gloo {
    fn rank(&self) -> u32 {
        self.launch.rank
    }

    fn world(&self) -> u32 {
        self.launch.world
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        self.exchange_tensor(tensor, |member, tensor| member.sum(tensor))
    }

    fn broadcast(&self, tensor: &mut Tensor, root: u32) -> Result<()> {
        self.exchange_tensor(tensor, |member, tensor| member.broadcast(tensor, root.into()))
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let Launch { rank, world, .. } = self.launch;
        let (rank, world) = (rank as usize, world as usize);
        self.exchange(|member| {
            // Each adds to zeros at a place of its own: a sum of that puts together.
            let mut lengths = vec![0i64; world];
            lengths[rank] = length(own);
            let mut lengths = Tensor::f_from_slice(&lengths)?;
            member.sum(&mut lengths)?;
            let lengths: Vec<usize> = Vec::<i64>::try_from(&lengths)?.into_iter().map(|n| n as usize).collect();
            let (before, whole): (usize, usize) = (lengths[..rank].iter().sum(), lengths.iter().sum());
            let mut all = vec![0u8; whole];
            all[before..before + own.len()].copy_from_slice(own);
            if whole > 0 {
                let mut sum = Tensor::f_from_slice(&all)?;
                member.sum(&mut sum)?;
                all = Vec::try_from(&sum)?;
            }
            let mut rest = &all[..];
            let texts = lengths.iter().map(|&n| rest.split_off(..n).unwrap_or_default().to_vec()).collect();
            // Whoever has all may leave after this: not before everyone has. What fails here, the next exchange tells.
            let _ = member.sum(&mut Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?);
            Ok(texts)
        })
    }

    fn send(&self, tensor: &Tensor, to: u32) -> Result<Transfer> {
        let to = self.peer(to)?;
        if !tensor.is_contiguous() || tensor.device() != Device::Cpu {
            let got = (tensor.size(), tensor.device());
            return Err(Error::shape("send", "tensor", "contiguous and on the host", got));
        }
        let work = self.exchange(|member| member.send(tensor, to))?;
        Ok(Transfer { work, tensor: tensor.shallow_clone() })
    }

    fn receive(&self, shape: &[i64], kind: Kind, from: u32) -> Result<Transfer> {
        let from = self.peer(from)?;
        let mut tensor = Tensor::f_empty(shape, (kind, Device::Cpu))?;
        let work = self.exchange(|member| member.receive(&mut tensor, from))?;
        Ok(Transfer { work, tensor })
    }

    fn arrive(&self, transfer: Transfer) -> Result<Tensor> {
        let Transfer { work, tensor } = transfer;
        self.exchange(|_| work.wait())?;
        Ok(tensor)
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        self.heart = None;
        if self.broken.load(Ordering::Relaxed) {
            return;
        }
        if let Some(member) = self.member.take().and_then(Arc::into_inner) {
            member.close();
        }
    }
}

fn open(launch: &Launch, hosts: bool, timeout: Duration) -> Result<Member> {
    let text = |text: String| {
        CString::new(text).map_err(|e| Error::Launcher {
            variable: "MASTER_ADDR",
            value: launch.address.clone(),
            reason: e.to_string(),
        })
    };
    // What an earlier attempt of the launcher left in its store must not be met.
    let prefix = text(format!("lora/attempt_{}", launch.attempt))?;
    Member::open(&text(launch.address.clone())?, launch.port, hosts, millis(timeout), &prefix)
}

/// Waits until somebody listens where the store is to be. libtorch would wait too, for twice as long, and name nobody.
fn reach(launch: &Launch, deadline: Instant, timeout: Duration) -> Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let reason = match (launch.address.as_str(), launch.port).to_socket_addrs().map(|mut all| all.next()) {
            Ok(Some(address)) => match TcpStream::connect_timeout(&address, left.max(LOOK)) {
                Ok(_) => return Ok(()),
                Err(e) => e.to_string(),
            },
            Ok(None) => "the name has no address".into(),
            Err(e) => e.to_string(),
        };
        if left.is_zero() {
            return Err(not_reached(launch, timeout, reason));
        }
        thread::sleep(LOOK);
    }
}

fn not_reached(launch: &Launch, timeout: Duration, reason: String) -> Error {
    let Launch { rank, world, .. } = *launch;
    Error::StoreNotReached { rank, world, address: launch.place(), seconds: timeout.as_secs(), reason }
}

/// Says that this process has come, and waits until all have.
fn assemble(launch: &Launch, member: &Member, deadline: Instant, timeout: Duration) -> Result<()> {
    let here = |rank: u32, more: i64| member.add(&CString::new(format!("here/{rank}")).unwrap_or_default(), more);
    let Launch { rank, world, .. } = *launch;
    if here(rank, 1)? > 1 {
        let reason = format!("another process has come as this rank; each of the {world} must have one of its own");
        return Err(Error::Launcher { variable: "RANK", value: rank.to_string(), reason });
    }
    let mut missing: Vec<u32> = (0..world).collect();
    loop {
        let mut still = Vec::new();
        for rank in missing {
            if here(rank, 0)? == 0 {
                still.push(rank);
            }
        }
        missing = still;
        if missing.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let (address, seconds) = (launch.place(), timeout.as_secs());
            return Err(Error::Missing { rank, world, address, seconds, missing });
        }
        thread::sleep(LOOK);
    }
}

/// What libtorch said, without what it was asked.
fn said(error: &Error) -> String {
    match error {
        Error::Shim { message, .. } => message.clone(),
        other => other.to_string(),
    }
}

fn length(bytes: &[u8]) -> i64 {
    i64::try_from(bytes.len()).unwrap_or(i64::MAX)
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

fn whole(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
