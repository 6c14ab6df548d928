//! The border to the shim: declarations, and the one place where pointers are made and taken back.
//!
//! Every shim function returns null, or the text of the C++ exception that it caught, allocated with `malloc`.

mod host_copy;
mod member;

pub(crate) use host_copy::{HostCopy, pinned, set_data};
pub(crate) use member::{Member, Work};

use crate::error::{Error, Result};
use crate::weight::Weight;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use tch::Tensor;
use torch_sys::C_tensor;

/// A frozen weight as the shim sees it (shim/stored.h); null means absent.
#[repr(C)]
pub(crate) struct RawWeight {
    data: *const C_tensor,
    absmax: *const C_tensor,
    nested: *const C_tensor,
    table: *const C_tensor,
    offset: f64,
    rows: i64,
    cols: i64,
    block: i64,
    nested_block: i64,
    form: i32,
}

impl RawWeight {
    fn new(form: i32, data: &Tensor, [rows, cols]: [i64; 2]) -> Self {
        let (absent, data) = (ptr::null(), data.as_ptr());
        Self {
            data,
            absmax: absent,
            nested: absent,
            table: absent,
            offset: 0.0,
            rows,
            cols,
            block: 0,
            nested_block: 0,
            form,
        }
    }

    pub(crate) fn plain(t: &Tensor) -> Self {
        let side = |i: usize| t.size().get(i).copied().unwrap_or(0);
        Self::new(0, t, [side(0), side(1)])
    }

    pub(crate) fn nf4(codes: &Tensor, shape: [i64; 2], block: i64, scales: &Tensor) -> Self {
        Self { absmax: scales.as_ptr(), block, ..Self::new(1, codes, shape) }
    }

    pub(crate) fn nested(self, absmax: &Tensor, table: &Tensor, offset: f64, block: i64) -> Self {
        Self { nested: absmax.as_ptr(), table: table.as_ptr(), offset, nested_block: block, ..self }
    }

    pub(crate) fn int8(codes: &Tensor, scales: &Tensor) -> Self {
        Self { absmax: scales.as_ptr(), form: 2, ..Self::plain(codes) }
    }
}

/// A projection as the shim sees it; null means absent.
#[repr(C)]
pub(crate) struct RawProjection {
    pub(crate) weight: RawWeight,
    pub(crate) bias: *const C_tensor,
    pub(crate) a: *const C_tensor,
    pub(crate) b: *const C_tensor,
    pub(crate) scale: f64,
}

/// What an input was made of, as the shim sees it; null means absent.
#[repr(C)]
pub(crate) struct RawOrigin {
    pub(crate) parts: [*const C_tensor; 3],
    pub(crate) eps: f64,
    pub(crate) form: i32,
}

#[repr(C)]
pub(crate) struct RawAdamW {
    pub(crate) lr: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
    pub(crate) step: i64,
}

#[repr(C)]
pub(crate) struct RawLion {
    pub(crate) lr: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) weight_decay: f64,
}

/// A moment in 8 bits.
#[repr(C)]
pub(crate) struct RawBlockwise {
    codes: *const C_tensor,
    absmax: *const C_tensor,
    table: *const C_tensor,
}

impl RawBlockwise {
    pub(crate) fn new(codes: &Tensor, absmax: &Tensor, table: &Tensor) -> Self {
        Self { codes: codes.as_ptr(), absmax: absmax.as_ptr(), table: table.as_ptr() }
    }
}

type Message = *mut c_char;

unsafe extern "C" {
    fn free(p: *mut c_void);
    fn lt_lora_linear(
        x: *const C_tensor,
        origin: *const RawOrigin,
        p: *const RawProjection,
        n: usize,
        dropout: f64,
        out: *mut *mut C_tensor,
    ) -> Message;
    fn lt_rms_norm(x: *const C_tensor, w: *const C_tensor, eps: f64, out: *mut *mut C_tensor) -> Message;
    fn lt_rotary(x: *const C_tensor, cos: *const C_tensor, sin: *const C_tensor, out: *mut *mut C_tensor) -> Message;
    fn lt_gated(act: i64, gate: *const C_tensor, up: *const C_tensor, out: *mut *mut C_tensor) -> Message;
    fn lt_dropout(x: *const C_tensor, p: f64, out: *mut *mut C_tensor) -> Message;
    fn lt_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        lens: *const i64,
        n: usize,
        scale: f64,
        window: i64,
        softcap: f64,
        causal: c_int,
        out: *mut *mut C_tensor,
    ) -> Message;
    fn lt_cross_entropy(
        h: *const C_tensor,
        head: *const RawProjection,
        targets: *const C_tensor,
        weights: *const C_tensor,
        softcap: f64,
        chunk: i64,
        out: *mut *mut C_tensor,
    ) -> Message;
    fn lt_token_losses(
        h: *const C_tensor,
        head: *const RawProjection,
        targets: *const C_tensor,
        softcap: f64,
        chunk: i64,
        out: *mut *mut C_tensor,
    ) -> Message;
    fn lt_dense(w: *const RawWeight, out: *mut *mut C_tensor) -> Message;
    fn lt_row_norms(w: *const RawWeight, out: *mut *mut C_tensor) -> Message;
    fn lt_pack_nf4(w: *const C_tensor, block: i64, codes: *mut *mut C_tensor, scales: *mut *mut C_tensor) -> Message;
    fn lt_view_bytes(
        bytes: *const c_void,
        sizes: *const i64,
        n: usize,
        kind: i32,
        owner: *mut c_void,
        release: extern "C" fn(*mut c_void),
        out: *mut *mut C_tensor,
    ) -> Message;
    fn lt_backward(outputs: *const *const C_tensor, grads: *const *const C_tensor, n: usize) -> Message;
    fn lt_set_grad(param: *const C_tensor, grad: *const C_tensor) -> Message;
    fn lt_adamw(
        p: *const C_tensor,
        g: *const C_tensor,
        m: *const C_tensor,
        v: *const C_tensor,
        h: *const RawAdamW,
    ) -> Message;
    fn lt_lion(p: *const C_tensor, g: *const C_tensor, m: *const C_tensor, h: *const RawLion) -> Message;
    fn lt_adamw_8bit(
        p: *const C_tensor,
        g: *const C_tensor,
        m: *const RawBlockwise,
        v: *const RawBlockwise,
        h: *const RawAdamW,
    ) -> Message;
    fn lt_norm(g: *const C_tensor, out: *mut f64) -> Message;
    fn lt_uniform(seed: u64, shapes: *const i64, bounds: *const f64, n: usize, out: *mut *mut C_tensor) -> Message;
    fn lt_device_memory(index: i64, out: *mut i64) -> Message;
    fn lt_device_free(index: i64, out: *mut u64) -> Message;
    fn lt_cuda_in_build(out: *mut i32) -> Message;
    fn lt_synchronize() -> Message;
    fn lt_keep_freed_memory() -> Message;
    fn lt_give_back_freed_memory() -> Message;
    fn lt_use_device_kernels(kernels: u8) -> Message;
    fn lt_compile_device_kernels(architecture: i32, bytes: *mut u64) -> Message;
    fn lt_use_products(products: u8) -> Message;
    fn lt_products(out: *mut u8) -> Message;
    fn lt_widest_products(out: *mut u8) -> Message;
}

fn check(op: &'static str, message: Message) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null message is a NUL-terminated string that the shim allocated with malloc and gave to us.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        free(message.cast());
        text
    };
    Err(Error::from_shim(op, &text))
}

fn take(op: &'static str, call: impl FnOnce(*mut *mut C_tensor) -> Message) -> Result<Tensor> {
    let mut out = ptr::null_mut();
    check(op, call(&mut out))?;
    // SAFETY: the shim reported success, so `out` is a tensor that it allocated and gave to us.
    Ok(unsafe { Tensor::from_ptr(out) })
}

fn optional(t: Option<&Tensor>) -> *const C_tensor {
    t.map_or(ptr::null(), Tensor::as_ptr)
}

pub(crate) fn raw_projection(
    weight: &Weight,
    bias: Option<&Tensor>,
    adapter: Option<(&Tensor, &Tensor, f64)>,
) -> RawProjection {
    RawProjection {
        weight: weight.raw(),
        bias: optional(bias),
        a: optional(adapter.map(|(a, _, _)| a)),
        b: optional(adapter.map(|(_, b, _)| b)),
        scale: adapter.map_or(0.0, |(_, _, s)| s),
    }
}

// SAFETY (all calls below): every pointer comes from a live `Tensor` or slice borrowed for the call, the shim keeps none
// of them (it copies the reference-counted handles that it needs), and it catches every C++ exception.

pub(crate) fn lora_linear(
    x: &Tensor,
    origin: Option<&RawOrigin>,
    p: &[RawProjection],
    dropout: f64,
) -> Result<Vec<Tensor>> {
    let mut out = vec![ptr::null_mut(); p.len()];
    let origin = origin.map_or(ptr::null(), ptr::from_ref);
    check("lora_linear", unsafe {
        lt_lora_linear(x.as_ptr(), origin, p.as_ptr(), p.len(), dropout, out.as_mut_ptr())
    })?;
    Ok(out.into_iter().map(|t| unsafe { Tensor::from_ptr(t) }).collect())
}

pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    take("rms_norm", |out| unsafe { lt_rms_norm(x.as_ptr(), w.as_ptr(), eps, out) })
}

pub(crate) fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    take("rotary", |out| unsafe { lt_rotary(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), out) })
}

pub(crate) fn gated(act: i64, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    take("gated", |out| unsafe { lt_gated(act, gate.as_ptr(), up.as_ptr(), out) })
}

pub(crate) fn dropout(x: &Tensor, p: f64) -> Result<Tensor> {
    take("dropout", |out| unsafe { lt_dropout(x.as_ptr(), p, out) })
}

#[expect(clippy::too_many_arguments, reason = "those of the shim's function")]
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lens: &[i64],
    scale: f64,
    window: i64,
    softcap: f64,
    causal: bool,
) -> Result<Tensor> {
    let (q, k, v, causal) = (q.as_ptr(), k.as_ptr(), v.as_ptr(), c_int::from(causal));
    take("attention", |out| unsafe {
        lt_attention(q, k, v, lens.as_ptr(), lens.len(), scale, window, softcap, causal, out)
    })
}

pub(crate) fn cross_entropy(
    h: &Tensor,
    head: &RawProjection,
    targets: &Tensor,
    weights: Option<&Tensor>,
    softcap: f64,
    chunk: i64,
) -> Result<Tensor> {
    let (h, targets, weights) = (h.as_ptr(), targets.as_ptr(), weights.map_or(std::ptr::null(), |w| w.as_ptr()));
    take("cross_entropy", |out| unsafe { lt_cross_entropy(h, head, targets, weights, softcap, chunk, out) })
}

pub(crate) fn token_losses(
    h: &Tensor,
    head: &RawProjection,
    targets: &Tensor,
    softcap: f64,
    chunk: i64,
) -> Result<Tensor> {
    take("token_losses", |out| unsafe { lt_token_losses(h.as_ptr(), head, targets.as_ptr(), softcap, chunk, out) })
}

pub(crate) fn dense(w: &RawWeight) -> Result<Tensor> {
    take("dense", |out| unsafe { lt_dense(w, out) })
}

pub(crate) fn row_norms(w: &RawWeight) -> Result<Tensor> {
    take("row_norms", |out| unsafe { lt_row_norms(w, out) })
}

/// Codes and scales of a contiguous fp32 weight on the CPU.
pub(crate) fn pack_nf4(w: &Tensor, block: i64) -> Result<(Tensor, Tensor)> {
    let (mut codes, mut scales) = (ptr::null_mut(), ptr::null_mut());
    check("pack_nf4", unsafe { lt_pack_nf4(w.as_ptr(), block, &mut codes, &mut scales) })?;
    Ok(unsafe { (Tensor::from_ptr(codes), Tensor::from_ptr(scales)) })
}

/// A CPU tensor over bytes that `owner` holds; it lives as long as a view of them.
pub(crate) fn view_bytes<O: AsRef<[u8]> + Send + Sync + 'static>(
    owner: std::sync::Arc<O>,
    offset: usize,
    shape: &[i64],
    number: i32,
) -> Result<Tensor> {
    extern "C" fn release<O>(owner: *mut c_void) {
        // SAFETY: `owner` is the box that was leaked below, and libtorch calls this once.
        drop(unsafe { Box::from_raw(owner.cast::<std::sync::Arc<O>>()) });
    }
    let start = (*owner).as_ref()[offset..].as_ptr();
    let owner = Box::into_raw(Box::new(owner));
    let result = take("view_bytes", |out| unsafe {
        lt_view_bytes(start.cast(), shape.as_ptr(), shape.len(), number, owner.cast(), release::<O>, out)
    });
    if result.is_err() {
        // SAFETY: no tensor was made, so the box is still ours.
        drop(unsafe { Box::from_raw(owner) });
    }
    result
}

pub(crate) fn backward(outputs: &[&Tensor], grads: &[&Tensor]) -> Result<()> {
    let outputs: Vec<_> = outputs.iter().map(|t| t.as_ptr()).collect();
    let grads: Vec<_> = grads.iter().map(|t| t.as_ptr()).collect();
    check("backward", unsafe { lt_backward(outputs.as_ptr(), grads.as_ptr(), outputs.len()) })
}

pub(crate) fn set_grad(param: &Tensor, grad: &Tensor) -> Result<()> {
    check("set_grad", unsafe { lt_set_grad(param.as_ptr(), grad.as_ptr()) })
}

pub(crate) fn adamw(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, h: &RawAdamW) -> Result<()> {
    check("adamw", unsafe { lt_adamw(p.as_ptr(), g.as_ptr(), m.as_ptr(), v.as_ptr(), h) })
}

pub(crate) fn lion(p: &Tensor, g: &Tensor, m: &Tensor, h: &RawLion) -> Result<()> {
    check("lion", unsafe { lt_lion(p.as_ptr(), g.as_ptr(), m.as_ptr(), h) })
}

pub(crate) fn adamw_8bit(p: &Tensor, g: &Tensor, m: &RawBlockwise, v: &RawBlockwise, h: &RawAdamW) -> Result<()> {
    check("adamw_8bit", unsafe { lt_adamw_8bit(p.as_ptr(), g.as_ptr(), m, v, h) })
}

pub(crate) fn norm(g: &Tensor) -> Result<f64> {
    let mut out = 0.0;
    check("grad_norm", unsafe { lt_norm(g.as_ptr(), &mut out) })?;
    Ok(out)
}

/// Matrices `[rows, columns]`, each uniform within its bound, drawn in turn from one generator.
pub(crate) fn uniform(seed: u64, shapes: &[[i64; 2]], bounds: &[f64]) -> Result<Vec<Tensor>> {
    debug_assert_eq!(shapes.len(), bounds.len());
    let n = shapes.len().min(bounds.len());
    let mut out = vec![ptr::null_mut(); n];
    check("uniform", unsafe { lt_uniform(seed, shapes.as_ptr().cast(), bounds.as_ptr(), n, out.as_mut_ptr()) })?;
    Ok(out.into_iter().map(|t| unsafe { Tensor::from_ptr(t) }).collect())
}

/// Current, peak and reserved bytes of a CUDA device.
pub(crate) fn device_free(index: i64) -> Result<u64> {
    let mut out = 0;
    check("device_free", unsafe { lt_device_free(index, &mut out) })?;
    Ok(out)
}

pub(crate) fn device_memory(index: i64) -> Result<[i64; 3]> {
    let mut out = [0i64; 3];
    check("device_memory", unsafe { lt_device_memory(index, out.as_mut_ptr()) })?;
    Ok(out)
}

/// Whether the CUDA backend has registered itself with the loaded libtorch.
pub(crate) fn cuda_registered() -> bool {
    let mut out = 0;
    check("cuda", unsafe { lt_cuda_in_build(&mut out) }).is_ok() && out != 0
}

pub(crate) fn synchronize() -> Result<()> {
    check("synchronize", unsafe { lt_synchronize() })
}

pub(crate) fn give_back_freed_memory() -> Result<()> {
    check("give_back_freed_memory", unsafe { lt_give_back_freed_memory() })
}

pub(crate) fn keep_freed_memory() -> Result<()> {
    check("keep_freed_memory", unsafe { lt_keep_freed_memory() })
}

pub(crate) fn use_device_kernels(kernels: u8) -> Result<()> {
    check("use_device_kernels", unsafe { lt_use_device_kernels(kernels) })
}

pub(crate) fn compile_device_kernels(architecture: i32) -> Result<u64> {
    let mut bytes = 0;
    check("compile_device_kernels", unsafe { lt_compile_device_kernels(architecture, &mut bytes) })?;
    Ok(bytes)
}

pub(crate) fn use_products(products: u8) -> Result<()> {
    check("use_products", unsafe { lt_use_products(products) })
}

pub(crate) fn products() -> Result<u8> {
    let mut out = 0;
    check("products", unsafe { lt_products(&mut out) })?;
    Ok(out)
}

pub(crate) fn widest_products() -> Result<u8> {
    let mut out = 0;
    check("widest_products", unsafe { lt_widest_products(&mut out) })?;
    Ok(out)
}

/// Loads a shared library for the rest of the process, so that its static registrations take effect.
pub(crate) fn load_forever(path: &std::path::Path) -> std::result::Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the library is libtorch's own CUDA backend, found beside the libtorch_cpu.so that is already loaded.
    match unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(e) => Err(e.to_string()),
    }
}

/// The bytes of a contiguous CPU tensor, for as long as the tensor is borrowed.
pub(crate) fn bytes_of(t: &Tensor, len: usize) -> &[u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller has checked that the tensor is contiguous, on the CPU, and holds `len` bytes.
    unsafe { std::slice::from_raw_parts(t.data_ptr() as *const u8, len) }
}

/// A tensor over a copy of `bytes`.
pub(crate) fn copy_from_bytes(bytes: &[u8], shape: &[i64], kind: tch::Kind) -> Result<Tensor> {
    let t = Tensor::f_empty(shape, (kind, tch::Device::Cpu))?;
    if !bytes.is_empty() {
        // SAFETY: the caller has checked that the fresh, contiguous tensor holds exactly `bytes.len()` bytes.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), t.data_ptr() as *mut u8, bytes.len()) };
    }
    Ok(t)
}
