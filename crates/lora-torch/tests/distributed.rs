//! Processes that do something together: here each is a thread with a membership of its own.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

use lora_torch::Error;
use lora_torch::distributed::{Collective, Gloo, Launch, Single};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(60);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn launch(rank: u32, world: u32, port: u16) -> Launch {
    Launch { rank, world, local_rank: rank, address: "127.0.0.1".into(), port, hosts: true, attempt: 0 }
}

/// Runs `body` in each member of a group, and returns what each came to, in the order of ranks.
fn together<T: Send>(world: u32, body: impl Fn(Gloo) -> T + Sync) -> Vec<T> {
    let port = free_port();
    let member = |rank| body(Gloo::connect(&launch(rank, world, port), PATIENCE).unwrap());
    thread::scope(|scope| {
        let running: Vec<_> = (0..world).map(|rank| scope.spawn(move || member(rank))).collect();
        running.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

/// Numbers of which each rank has others, of very different sizes.
fn noise(rank: u32, n: i64) -> Tensor {
    let x = Tensor::arange(n, (Kind::Float, Device::Cpu)) + f64::from(rank);
    (&x * 12.9898).sin() * (&x * 0.37).cos().exp() * 1e3
}

#[test]
fn sums_are_right_and_have_the_same_bits_everywhere() {
    for world in 2..=4 {
        let sums = together(world, |member| {
            assert_eq!(member.world(), world);
            [1, 7, 65_537].map(|n| {
                let mut t = noise(member.rank(), n);
                member.all_reduce_sum(&mut t).unwrap();
                Vec::<f32>::try_from(&t).unwrap()
            })
        });
        assert!(sums.iter().all(|other| *other == sums[0]), "{world}");
        for (n, found) in [1, 7, 65_537].into_iter().zip(&sums[0]) {
            let wide = (0..world).map(|rank| noise(rank, n).to_kind(Kind::Double)).reduce(|a, b| a + b).unwrap();
            let sizes = (0..world).map(|rank| noise(rank, n).to_kind(Kind::Double).abs()).reduce(|a, b| a + b).unwrap();
            // Every one of the additions rounds once.
            let bound = sizes * (f64::from(world) * f64::from(f32::EPSILON));
            let off = (Tensor::from_slice(found).to_kind(Kind::Double) - wide).abs();
            assert!((off - bound).max().double_value(&[]) <= 0.0, "{world} x {n}");
        }
    }
}

#[test]
fn a_broadcast_and_a_gather_reach_everybody() {
    let found = together(3, |member| {
        let mut t = Tensor::from_slice(&[f64::from(member.rank()), 7.5]);
        member.broadcast(&mut t, 2).unwrap();
        let own = vec![member.rank() as u8; member.rank() as usize];
        let first = member.gather(&own).unwrap();
        let second = member.gather(b"again").unwrap();
        assert!(second.iter().all(|one| one == b"again"));
        (Vec::<f64>::try_from(&t).unwrap(), first)
    });
    for (numbers, gathered) in found {
        assert_eq!(numbers, [2.0, 7.5]);
        assert_eq!(gathered, [vec![], vec![1], vec![2, 2]]);
    }
}

#[test]
fn what_one_gives_another_takes_in_its_order() {
    let (kind, device) = (Kind::Float, Device::Cpu);
    let found = together(3, |member| {
        let rank = member.rank();
        let (before, after) = ((rank + 2) % 3, (rank + 1) % 3);
        // All give before any takes: a transfer that was begun keeps nobody waiting.
        let given: Vec<_> = (0..5)
            .map(|i| member.send(&noise(rank, 1000 + i).to_kind(if i == 2 { Kind::BFloat16 } else { kind }), after))
            .map(Result::unwrap)
            .collect();
        for i in 0..5 {
            let as_sent = if i == 2 { Kind::BFloat16 } else { kind };
            let transfer = member.receive(&[1000 + i], as_sent, before).unwrap();
            assert!(member.arrive(transfer).unwrap().equal(&noise(before, 1000 + i).to_kind(as_sent)), "{rank}, {i}");
        }
        for (i, transfer) in (0..).zip(given) {
            assert_eq!(member.arrive(transfer).unwrap().size(), [1000 + i]);
        }
        let refused = member.send(&Tensor::zeros([2, 3], (kind, device)).transpose(0, 1), after).unwrap_err();
        assert!(matches!(refused, Error::Shape { .. }), "{refused}");
        for peer in [rank, 3] {
            let refused = member.receive(&[1], kind, peer).unwrap_err();
            assert!(matches!(refused, Error::NoPeer { world: 3, .. }), "{refused}");
        }
        // Neither was an exchange that broke.
        member.gather(b"on").unwrap().len()
    });
    assert_eq!(found, [3; 3]);
    assert!(matches!(Single.send(&Tensor::zeros([1], (kind, device)), 0), Err(Error::NoPeer { .. })));
}

#[test]
fn a_transfer_with_one_that_leaves_names_it() {
    let errors = together(2, |member| {
        if member.rank() == 1 {
            return Vec::new();
        }
        let start = Instant::now();
        let taken =
            member.receive(&[1 << 20], Kind::Float, 1).and_then(|transfer| member.arrive(transfer)).unwrap_err();
        // Nobody takes this, either.
        let given = member.send(&Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu)), 1).map(drop).unwrap_err();
        assert!(start.elapsed() < PATIENCE / 2, "{taken}");
        vec![taken, given]
    });
    for error in &errors[0] {
        assert!(matches!(error, Error::Lost { lost, rank: 0, .. } if *lost == [1]), "{error}");
    }
}

#[test]
fn a_process_alone_has_everything_already() {
    let mut t = Tensor::from_slice(&[3.0f32, 4.0]);
    Single.all_reduce_sum(&mut t).unwrap();
    Single.broadcast(&mut t, 0).unwrap();
    assert_eq!(Vec::<f32>::try_from(&t).unwrap(), [3.0, 4.0]);
    assert_eq!(Single.gather(b"own").unwrap(), [b"own".to_vec()]);
    assert_eq!((Single.rank(), Single.world()), (0, 1));
}

#[test]
fn a_member_that_leaves_is_named() {
    let errors = together(3, |member| {
        if member.rank() == 1 {
            return None;
        }
        let start = Instant::now();
        let error = member.all_reduce_sum(&mut Tensor::zeros([8], (Kind::Float, Device::Cpu))).unwrap_err();
        assert!(start.elapsed() < PATIENCE / 2, "{error}");
        let again = member.gather(b"x").unwrap_err();
        assert!(matches!(again, Error::Lost { ref lost, .. } if *lost == [1]), "{again}");
        // Rank 0 has the store and stays until the other has looked.
        thread::sleep(Duration::from_secs(u64::from(member.rank() == 0) * 3));
        Some(error)
    });
    for (rank, error) in [0u32, 2].into_iter().zip(errors.into_iter().flatten()) {
        assert!(matches!(error, Error::Lost { ref lost, rank: own, .. } if *lost == [1] && own == rank), "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("rank {rank} of 3")) && text.contains("rank 1 lost"), "{text}");
    }
}

#[test]
fn those_that_do_not_come_are_named() {
    let short = Duration::from_secs(1);
    let start = Instant::now();
    let port = free_port();
    let error = Gloo::connect(&launch(0, 3, port), short).unwrap_err();
    assert!(matches!(error, Error::Missing { ref missing, .. } if *missing == [1, 2]), "{error}");
    let nobody = Gloo::connect(&launch(1, 2, free_port()), short).unwrap_err();
    assert!(matches!(nobody, Error::StoreNotReached { rank: 1, .. }), "{nobody}");
    let nowhere = Launch { address: "no-such-host.invalid".into(), ..launch(1, 2, 1) };
    let unknown = Gloo::connect(&nowhere, short).unwrap_err();
    let text = unknown.to_string();
    assert!(text.contains("no-such-host.invalid:1") && text.contains("MASTER_ADDR"), "{text}");
    assert!(start.elapsed() < PATIENCE, "each is bounded by its time");

    let other = TcpListener::bind("0.0.0.0:0").unwrap();
    let taken = Gloo::connect(&launch(0, 2, other.local_addr().unwrap().port()), short).unwrap_err();
    assert!(matches!(taken, Error::StoreTaken { .. }) && taken.to_string().contains("MASTER_PORT"), "{taken}");
}

/// A cable to a port of this machine, which passes nothing on once it is cut; nobody is told that it was.
struct Cable {
    port: u16,
    cut: Arc<AtomicBool>,
}

impl Cable {
    fn to(port: u16) -> Self {
        let (listener, cut) = (TcpListener::bind("127.0.0.1:0").unwrap(), Arc::new(AtomicBool::new(false)));
        let cable = Self { port: listener.local_addr().unwrap().port(), cut: Arc::clone(&cut) };
        thread::spawn(move || {
            for near in listener.incoming().map(Result::unwrap) {
                let far = TcpStream::connect(("127.0.0.1", port)).unwrap();
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to, cut) = (from.try_clone().unwrap(), to.try_clone().unwrap(), Arc::clone(&cut));
                    thread::spawn(move || pass_on(from, to, &cut));
                }
            }
        });
        cable
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool) {
    let mut bytes = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        if !cut.load(Ordering::SeqCst) && to.write_all(&bytes[..n]).is_err() {
            return;
        }
    }
}

#[test]
fn a_store_that_falls_silent_keeps_nobody_waiting() {
    let port = free_port();
    let cable = Cable::to(port);
    let lead = thread::spawn(move || {
        let member = Gloo::connect(&launch(0, 2, port), PATIENCE).unwrap();
        (member.gather(b"near").unwrap(), member.gather(b"near, too").unwrap())
    });
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        thread::sleep(Duration::from_millis(20));
    }
    let member = Gloo::connect(&launch(1, 2, cable.port), PATIENCE).unwrap();
    let before = member.gather(b"far").unwrap();
    cable.cut.store(true, Ordering::SeqCst);
    let start = Instant::now();
    // What the processes have to say to each other does not go through the store.
    let after = member.gather(b"").unwrap();
    assert_eq!(after, [b"near, too".to_vec(), Vec::new()]);
    assert_eq!(lead.join().unwrap(), (before, after));
    // Who is gone, it would tell.
    let error = member.gather(b"far").unwrap_err();
    assert!(matches!(error, Error::Lost { ref lost, .. } if *lost == [0]), "{error}");
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
}

#[test]
fn a_store_that_never_answers_keeps_nobody_waiting() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let start = Instant::now();
    let place = launch(1, 2, listener.local_addr().unwrap().port());
    let error = Gloo::connect(&place, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(error, Error::StoreNotReached { rank: 1, .. }), "{error}");
    assert!(start.elapsed() < PATIENCE / 2, "{error}");
}
