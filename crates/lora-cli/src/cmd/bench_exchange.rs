//! `lora bench exchange`: how long the processes of a launcher take to sum buffers of the size of an adapter's gradients, and to give
//! each other hidden states.

use crate::failure::usage;
use crate::out;
use crate::team::launched;
use anyhow::Result;
use lora_torch::distributed::{Collective, Gloo};
use serde::Serialize;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// How long they wait for each other.
const PATIENCE: Duration = Duration::from_secs(600);

/// The flags of `lora bench exchange`.
#[derive(Debug, clap::Args)]
pub(crate) struct ExchangeArgs {
    /// Numbers of float32 in a buffer, such as an adapter has parameters; with commas between several
    #[arg(long, value_name = "N", value_delimiter = ',', required = true, value_parser = clap::value_parser!(i64).range(1..))]
    numbers: Vec<i64>,
    /// Exchanges of each size, after one that warms up
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeats: u16,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// What a size came to at rank 0.
#[derive(Debug, Serialize)]
struct Measured {
    ranks: u32,
    numbers: i64,
    bytes: i64,
    /// Seconds of a sum over all, the median.
    sum: f64,
    /// Seconds until the buffer has gone to rank 1 and come back, the median.
    there_and_back: f64,
}

/// Runs the verb.
///
/// # Errors
/// A process that was started alone, or others that are lost.
pub(crate) fn run(args: &ExchangeArgs) -> Result<()> {
    let Some(launch) = launched()? else {
        return Err(usage(
            "exchanges need several processes: start it by torchrun or srun, or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set",
        ));
    };
    let group = Gloo::connect(&launch, PATIENCE)?;
    for &numbers in &args.numbers {
        let mut buffer = Tensor::f_ones([numbers], (Kind::Float, Device::Cpu)).map_err(lora_torch::Error::from)?;
        let sum = median(args.repeats, || Ok(group.all_reduce_sum(&mut buffer)?))?;
        let _zeros = buffer.f_zero_().map_err(lora_torch::Error::from)?;
        let there_and_back = median(args.repeats, || there_and_back(&group, &buffer))?;
        if group.rank() > 0 {
            continue;
        }
        let measured = Measured { ranks: group.world(), numbers, bytes: 4 * numbers, sum, there_and_back };
        match args.json {
            true => out::text(&format!("{}\n", serde_json::to_string(&measured)?))?,
            false => out::line(format!(
                "{:>12} numbers, {:>9}: sum over {} ranks {}, there and back {}",
                out::count(numbers.unsigned_abs()),
                out::bytes(measured.bytes.unsigned_abs()),
                measured.ranks,
                out::seconds(sum),
                out::seconds(there_and_back)
            ))?,
        }
    }
    // Rank 0 has the store, and leaves when all are done.
    group.gather(b"done")?;
    Ok(())
}

fn there_and_back(group: &Gloo, buffer: &Tensor) -> Result<()> {
    let give = |to| -> Result<()> { Ok(group.arrive(group.send(buffer, to)?).map(drop)?) };
    let take = |from| -> Result<()> { Ok(group.arrive(group.receive(&buffer.size(), Kind::Float, from)?).map(drop)?) };
    match group.rank() {
        0 => give(1).and_then(|()| take(1)),
        1 => take(0).and_then(|()| give(0)),
        _ => Ok(()),
    }
}

/// The median of so many times, after one more that does not count.
fn median(repeats: u16, mut once: impl FnMut() -> Result<()>) -> Result<f64> {
    once()?;
    let mut times = Vec::new();
    for _ in 0..repeats.max(1) {
        let start = Instant::now();
        once()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or_default())
}
