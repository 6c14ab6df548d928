//! The kernels of a CUDA device: their text computed on the CPU against the plain twins, and compiled where NVRTC is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)] // a test that cannot go on has failed; what was not tested is said

mod cases;

use cases::{BF16_TOLERANCE, F32_TOLERANCE, F64_TOLERANCE, cases, error_of, leaves, run};
use lora_torch::{
    CudaStatus, DeviceKernels, Nf4, Weight, compile_device_kernels, cuda_status, dropout, manual_seed,
    use_device_kernels,
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tch::{Device, Kind, Tensor};

/// float16 keeps 11 bits, three more than bfloat16.
const F16_TOLERANCE: f64 = BF16_TOLERANCE / 8.0;

/// The choice is the process's, so tests take it in turns; it ends with libtorch's.
struct Chosen {
    _turn: MutexGuard<'static, ()>,
}

impl Chosen {
    fn emulated() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        use_device_kernels(DeviceKernels::Emulated).unwrap();
        Self { _turn: turn }
    }

    /// What `f` gives without the kernels.
    fn without<T>(&self, f: impl Fn() -> T) -> T {
        use_device_kernels(DeviceKernels::Libtorch).unwrap();
        let done = f();
        use_device_kernels(DeviceKernels::Emulated).unwrap();
        done
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let _ = use_device_kernels(DeviceKernels::Libtorch);
    }
}

/// Where kernels are tried: emulated on the CPU, and compiled on a CUDA device where there is one.
fn ways() -> Vec<(DeviceKernels, Device)> {
    let mut ways = vec![(DeviceKernels::Emulated, Device::Cpu)];
    match cuda_status() {
        CudaStatus::Loaded { .. } => ways.push((DeviceKernels::Compiled, Device::Cuda(0))),
        status => {
            assert!(std::env::var_os("LORA_REQUIRE_CUDA").is_none(), "LORA_REQUIRE_CUDA is set: {status:?}");
            eprintln!("device_kernels: NOT RUN ON A DEVICE ({status:?})");
        }
    }
    ways
}

#[test]
fn kernels_equal_the_plain_twins() {
    let _chosen = Chosen::emulated();
    let kinds = [
        (Kind::Float, F32_TOLERANCE),
        (Kind::Double, F64_TOLERANCE),
        (Kind::BFloat16, BF16_TOLERANCE),
        (Kind::Half, F16_TOLERANCE),
    ];
    let ways = ways().into_iter().flat_map(|way| kinds.map(|kind| (way, kind)));
    for ((kernels, device), (kind, tolerance)) in ways {
        use_device_kernels(kernels).unwrap();
        let wide = matches!(kind, Kind::Float | Kind::Double);
        // The others are libtorch's there, which has not all of them in 16 bits on the CPU.
        let own = |name: &str| wide || !["lora_linear", "rms_norm", "attention"].contains(&name);
        for (i, case) in cases().iter().enumerate().filter(|(_, case)| own(case.name)) {
            let (y, grads) = run(&case.fused, &leaves(case, kind, device));
            let (y2, grads2) = run(&case.plain, &leaves(case, kind, device));
            let name = format!("{} (case {i}, {kind:?}, {device:?})", case.name);
            assert!(error_of(&y, &y2) < tolerance, "{name}: {}", error_of(&y, &y2));
            for (j, (g, g2)) in grads.iter().zip(&grads2).enumerate() {
                assert_eq!(g.is_some(), g2.is_some(), "{name}: gradient {j}");
                let (Some(g), Some(g2)) = (g, g2) else { continue };
                assert!(error_of(g, g2) < tolerance, "{name}, gradient {j}: {}", error_of(g, g2));
            }
        }
    }
}

#[test]
fn codes_of_nf4_stand_for_the_same_bits() {
    let chosen = Chosen::emulated();
    for shape in [[40i64, 64], [33, 50], [7, 9], [300, 2048]] {
        let n = shape[0] * shape[1];
        let weight = (Tensor::arange(n, (Kind::Float, Device::Cpu)) * 12.9898).sin().view(shape);
        for double in [false, true] {
            let packed = Nf4::pack(&weight, double).unwrap();
            if let Some((kernels, device)) = ways().into_iter().find(|(_, device)| *device != Device::Cpu) {
                use_device_kernels(kernels).unwrap();
                let there = Weight::Nf4(Nf4::pack(&weight, double).unwrap()).to_device(device).unwrap();
                let there = there.dense_rows(0, shape[0]).unwrap().to_device(Device::Cpu);
                assert!(
                    there.equal(&chosen.without(|| packed.dense_rows(0, shape[0]).unwrap())),
                    "{shape:?} on {device:?}"
                );
            }
            let of = |first, rows| packed.dense_rows(first, rows).unwrap();
            assert!(of(0, shape[0]).equal(&chosen.without(|| of(0, shape[0]))), "{shape:?}, double {double}");
            assert!(of(2, 3).equal(&chosen.without(|| of(2, 3))), "{shape:?}, double {double}");
        }
    }
}

#[test]
fn the_same_key_drops_the_same_places() {
    let chosen = Chosen::emulated();
    let drawn = |device| {
        let _drawing = manual_seed(5);
        dropout(&Tensor::ones([70, 33], (Kind::Float, device)), 0.3).unwrap().to_device(Device::Cpu)
    };
    let wanted = chosen.without(|| drawn(Device::Cpu));
    for (kernels, device) in ways() {
        use_device_kernels(kernels).unwrap();
        assert!(drawn(device).equal(&wanted), "{device:?}");
    }
}

#[test]
fn nvrtc_takes_the_text() {
    // Ampere, Hopper, and the two of Blackwell.
    for architecture in [80, 90, 100, 120] {
        match compile_device_kernels(architecture) {
            Ok(bytes) => assert!(bytes > 10_000, "sm_{architecture}: {bytes} bytes"),
            Err(e) if e.to_string().contains("no libnvrtc") => {
                assert!(std::env::var_os("LORA_REQUIRE_CUDA").is_none(), "LORA_REQUIRE_CUDA is set: {e}");
                eprintln!("device_kernels: NOT COMPILED: {e}");
                return;
            }
            Err(e) => panic!("sm_{architecture}: {e}"),
        }
    }
}
