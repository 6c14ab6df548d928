//! The step on fixed shapes and random tokens, measured: what `perf/peft_step.py` measures of PEFT, by the same count.

use crate::config::{Checkpointing, Optim};
use crate::error::{Error, Result};
use crate::params::FlatParams;
use lora_format::{AdapterFolder, TargetModules, read_adapter};
use lora_model::{Decoder, Keeping, ModelConfig, Packing, Storage, TokenBatch, all_linear, plan_injection};
use lora_torch::{AdamWScalars, Products, device_memory, peak_rss_bytes, synchronize, use_products};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// What to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchOptions {
    /// Checkpoint folder.
    pub model: PathBuf,
    /// Take the sizes of its `config.json` only, and draw the weights on the device.
    pub random: bool,
    /// Rows of a step.
    pub batch: i64,
    /// Tokens of a row.
    pub seq: i64,
    /// Rank; alpha is twice that.
    pub r: i64,
    /// Target modules; `None` is every linear layer.
    pub targets: Option<Vec<String>>,
    /// Start from this adapter instead of a fresh one.
    pub init_adapter: Option<PathBuf>,
    /// Train every weight instead of adapters.
    pub full: bool,
    /// What is kept for the backward pass.
    pub checkpointing: Checkpointing,
    /// Blocks that are computed again in any case.
    pub recompute_layers: u32,
    /// Steps measured, after two that warm up.
    pub steps: usize,
    /// What the model computes in.
    pub kind: Kind,
    /// Where.
    pub device: Device,
    /// Where the base's matrices lie.
    pub storage: Storage,
    /// Into what they are packed.
    pub packing: Option<Packing>,
    /// Token ids `[batch, seq]` to use instead of random ones.
    pub input_ids: Option<Vec<i64>>,
    /// Every step twice, with the products of `lora-torch` and with libtorch's, so that both see the same machine.
    pub both_products: bool,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchReport {
    /// Median seconds of a step.
    pub step_s: f64,
    /// Tokens per second.
    pub tok_s: f64,
    /// Share of the machine's rate of matrix products: operations that a LoRA step needs, over the step's time, over the
    /// rate right after that step; the median of all steps.
    pub of_matmul_rate: f64,
    /// Rate of a large matrix product, in 10⁹ operations a second: the median of those measured after each step.
    pub matmul_gflops: f64,
    /// Seconds of a step with libtorch's products over those of the step before it: the median, and the lower and upper
    /// quartile. Only where both were asked for.
    pub libtorch_over_own: Option<[f64; 3]>,
    /// Peak resident memory of the process, in MiB.
    pub rss_mb: u64,
    /// Peak memory of the device, in MiB.
    pub cuda_mb: Option<u64>,
    /// Loss of each step, warm-up included.
    pub losses: Vec<f64>,
    /// Trained parameters.
    pub trainable: i64,
}

/// Runs the measurement.
///
/// # Errors
/// What loading the model or a step reports.
pub fn bench_step(o: &BenchOptions) -> Result<BenchReport> {
    let storage = if o.packing.is_some() { Storage::Mapped } else { o.storage };
    let (config, keeping) = (ModelConfig::read(&o.model)?, Keeping { kind: o.kind, device: o.device, storage });
    let mut model = match o.random {
        true => Decoder::random(config, o.kind, o.device)?,
        false => Decoder::load_as(&o.model, config, 0, keeping, &mut |_, _| {})?,
    };
    if o.full {
        model.train_everything()?;
    } else if let Some(dir) = &o.init_adapter {
        let folder: AdapterFolder = read_adapter(dir)?;
        model.load_adapter(&folder)?;
    } else {
        let mut config = all_linear(o.r, 2.0 * o.r as f64);
        if let Some(names) = &o.targets {
            config.target_modules = Some(TargetModules::List(names.clone()));
        }
        model.inject(&plan_injection(&model.config, &config)?, 0)?;
    }
    if let Some(packing) = o.packing {
        model.pack(packing, &mut |_, _| {})?;
    }
    if storage == Storage::Host {
        model.keep_on_host()?;
    }
    model.remake = o.checkpointing.remakes();
    model.offload = o.checkpointing.offloads();
    let recompute = o.checkpointing.recompute(o.recompute_layers);
    let params = FlatParams::new(model.parameters(), None, Optim::AdamW)?;
    let batch = batch(&model.config, o)?;
    let trained = batch.trained() as f64;

    let mut number = 0;
    let mut step = || -> Result<f64> {
        number += 1;
        params.zero_grad()?;
        let loss = model.loss_and_backward(&batch, number as u64, 1.0 / trained, recompute)?;
        params.clip_grad_norm(1.0)?;
        params.update(&AdamWScalars {
            lr: 2e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: number,
        })?;
        Ok(loss.f_double_value(&[]).map_err(lora_torch::Error::from)? / trained)
    };
    let needed = operations(&model.config, o, params.len());
    let (mut losses, mut times, mut rates, mut shares) = (vec![step()?, step()?], Vec::new(), Vec::new(), Vec::new());
    let mut timed = |losses: &mut Vec<f64>| -> Result<f64> {
        synchronize(o.device)?;
        let start = Instant::now();
        losses.push(step()?);
        synchronize(o.device)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (mut ratios, chosen) = (Vec::new(), Products::current()?);
    for _ in 0..o.steps.max(1) {
        if o.both_products {
            use_products(Products::widest()?)?;
        }
        let time = timed(&mut losses)?;
        if o.both_products {
            use_products(Products::Libtorch)?;
            ratios.push(timed(&mut losses)? / time);
        }
        let rate = matmul_rate(o.device)?;
        times.push(time);
        rates.push(rate);
        shares.push(needed / time / rate);
    }
    use_products(chosen)?;
    let cuda_mb = device_memory(o.device)?.map(|m| m.peak >> 20);
    let (step_s, tokens) = (quantile(&mut times, 0.5), (o.batch * o.seq) as f64);
    Ok(BenchReport {
        step_s: round(step_s, 4),
        tok_s: round(tokens / step_s, 1),
        of_matmul_rate: round(quantile(&mut shares, 0.5), 3),
        matmul_gflops: round(quantile(&mut rates, 0.5) / 1e9, 1),
        libtorch_over_own: o.both_products.then(|| [0.5, 0.25, 0.75].map(|q| round(quantile(&mut ratios, q), 3))),
        rss_mb: peak_rss_bytes() >> 20,
        cuda_mb,
        losses: losses.into_iter().map(|x| round(x, 5)).collect(),
        trainable: params.len(),
    })
}

/// Every token of a row predicts the next, as `labels = input_ids` has it.
fn batch(config: &ModelConfig, o: &BenchOptions) -> Result<TokenBatch> {
    let count = (o.batch * o.seq) as usize;
    let ids = match &o.input_ids {
        Some(ids) if ids.len() == count => ids.clone(),
        Some(ids) => return Err(Error::BenchInput { expected: count, found: ids.len() }),
        None => (0..count as u64)
            .map(|i| 10 + (lora_torch::mix_seed(&[1, i]) % (config.vocab_size as u64 - 10)) as i64)
            .collect(),
    };
    let rows: Vec<i64> = (0..o.batch).flat_map(|b| (0..o.seq - 1).map(move |t| b * o.seq + t)).collect();
    let targets: Vec<i64> = rows.iter().map(|&r| ids[r as usize + 1]).collect();
    Ok(TokenBatch::new(config, &ids, &vec![o.seq; o.batch as usize], &rows, &targets, o.device)?)
}

/// Floating-point operations of a step: two products of the size of each weight forward and backward (three for full
/// training), causal attention at half the square, and the adapters.
fn operations(c: &ModelConfig, o: &BenchOptions, trainable: i64) -> f64 {
    let (h, hd, l) = (c.hidden_size as f64, c.head_dim as f64, c.num_hidden_layers as f64);
    let (nh, kv) = (c.num_attention_heads as f64, c.num_key_value_heads as f64);
    let mlps: i64 = (0..c.windows.len()).map(|i| c.mlp_weights(i)).sum();
    let per_token = l * (h * nh * hd * 2.0 + 2.0 * h * kv * hd) + mlps as f64 + h * c.vocab_size as f64;
    let attention = l * 2.0 * nh * hd * (o.seq as f64 / 2.0);
    let (passes, lora) = if o.full { (6.0, 0.0) } else { (4.0, trainable as f64) };
    (o.batch * o.seq) as f64 * (passes * per_token + 6.0 * attention + 6.0 * lora)
}

/// Operations a second of a square product: fp32 on the CPU, bf16 on a GPU.
fn matmul_rate(device: Device) -> Result<f64> {
    let (n, kind) = if device == Device::Cpu { (2048, Kind::Float) } else { (8192, Kind::BFloat16) };
    let random = || Tensor::f_randn([n, n], (kind, device)).map_err(lora_torch::Error::from);
    let (x, y) = (random()?, random()?);
    let product = || x.f_matmul(&y).map_err(lora_torch::Error::from);
    let mut times = Vec::new();
    for i in 0..4 {
        synchronize(device)?;
        let start = Instant::now();
        let _z = product()?;
        synchronize(device)?;
        if i >= 1 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(2.0 * (n as f64).powi(3) / quantile(&mut times, 0.5))
}

/// The value below which a share `q` of at least one number lies.
fn quantile(numbers: &mut [f64], q: f64) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[((numbers.len() as f64 * q) as usize).min(numbers.len() - 1)]
}

fn round(x: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (x * unit).round() / unit
}
