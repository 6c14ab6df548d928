//! The batches of the next steps, laid out by a thread of their own while the present step is computed.
//!
//! A run's place in the data is that of the step that was computed last. What was made ahead of it counts for nothing, so
//! that a run which goes on elsewhere, or after an end, takes the rows that it would have taken.

use crate::error::{Error, Result};
use crate::plan::RunPlan;
use crate::share::Share;
use lora_data::{Batch, Cursor, Prefetch, RowPlan, Rows, Sampler};

/// Steps that wait to be computed.
const AHEAD: usize = 2;

/// A micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Laid {
    pub(crate) batch: Batch,
    /// The examples in it, by their place in the training data.
    pub(crate) examples: Vec<usize>,
}

/// The micro-batches of a step that this process computes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    pub(crate) batches: Vec<Laid>,
    /// The number of each of them in the whole step.
    pub(crate) numbers: Vec<u64>,
    /// The place in the data behind them.
    pub(crate) next: Cursor,
}

/// What batches are made from.
#[derive(Debug, Clone)]
struct Maker {
    examples: Rows,
    rows: RowPlan,
    sampler: Sampler,
    batch_size: usize,
    micro_batches: u32,
    share: Share,
}

/// Gives out the steps of a run.
#[derive(Debug)]
pub(crate) struct Loader {
    maker: Maker,
    /// The place that the next item begins at, and the items.
    running: Option<(Cursor, Prefetch<Result<Step>>)>,
}

impl Loader {
    /// Steps of `micro_batches` times `batch_size` rows, of which a share is made.
    pub(crate) fn new(
        (examples, rows): (Rows, RowPlan),
        sampler: Sampler,
        batch_size: usize,
        micro_batches: u32,
        share: Share,
    ) -> Self {
        Self { maker: Maker { examples, rows, sampler, batch_size, micro_batches, share }, running: None }
    }

    /// The step that begins at a place in the data.
    ///
    /// # Errors
    /// What reading a row reports, at the step that the row belongs to.
    pub(crate) fn step_at(&mut self, cursor: Cursor) -> Result<Step> {
        let (_, mut items) = match self.running.take().filter(|(at, _)| *at == cursor) {
            Some(running) => running,
            None => (cursor, self.maker.start(cursor)?),
        };
        let gone = || Error::Loader { reason: "their thread broke down".into() };
        let step = items.next_item().ok_or_else(gone)??;
        self.running = Some((step.next, items));
        Ok(step)
    }
}

/// The order of a run's rows.
pub(crate) fn sampler_of(plan: &RunPlan) -> Sampler {
    let (config, seed) = (&plan.config.data, plan.config.seed);
    let sampler = match &plan.stages {
        _ if config.group_by_length => {
            let batch = plan.config.train.per_device_train_batch_size as usize;
            Sampler::grouped(plan.row_lengths(), batch, seed)
        }
        Some(stages) if config.shuffle => Sampler::staged(stages.clone(), seed),
        _ => Sampler::new(plan.rows.len(), seed, config.shuffle),
    };
    match plan.replay {
        Some(replay) => sampler.with_replay(replay),
        None => sampler,
    }
}

impl Maker {
    fn start(&self, from: Cursor) -> Result<Prefetch<Result<Step>>> {
        let (mut maker, mut cursor, mut failed) = (self.clone(), from, false);
        let next = move || {
            if failed {
                return None;
            }
            let step = maker.step(cursor);
            match &step {
                Ok(step) => cursor = step.next,
                Err(_) => failed = true,
            }
            Some(step)
        };
        Prefetch::start(AHEAD, next).map_err(|error| Error::Loader { reason: error.to_string() })
    }

    /// A step never crosses the end of an epoch, so the last one of an epoch may be smaller.
    fn step(&mut self, from: Cursor) -> Result<Step> {
        let (mut of_rows, mut next) = (Vec::new(), from);
        for _ in 0..self.micro_batches {
            if next.epoch != from.epoch {
                break;
            }
            let (rows, after) = self.sampler.next_batch(next, self.batch_size);
            of_rows.push(rows);
            next = after;
        }
        let own = self.share.own(&of_rows);
        let (mut batches, mut numbers) = (Vec::new(), Vec::new());
        for (number, (rows, _)) in (0..).zip(of_rows.iter().zip(own)).filter(|(_, (_, own))| *own) {
            let examples: Vec<usize> = rows.iter().flat_map(|&row| self.rows.members(row)).collect();
            batches.push(Laid { batch: self.examples.batch(examples.iter().copied())?, examples });
            numbers.push(number);
        }
        Ok(Step { batches, numbers, next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_data::{Example, Origin};

    fn loader(rows: usize) -> Loader {
        shared(rows, Share::default())
    }

    fn shared(rows: usize, share: Share) -> Loader {
        let example = |i: usize| Example {
            input_ids: vec![i as u32; 1 + i % 3],
            trained: (0..1 + i % 3).map(|t| t > 0).collect(),
            origin: Origin { file: std::path::Path::new("x").into(), record: i, line: i },
        };
        let examples = Rows::from((0..23).map(example).collect::<Vec<_>>());
        Loader::new((examples, RowPlan::one_each(rows)), Sampler::new(rows, 5, true), 2, 3, share)
    }

    /// Every step of two epochs, made one after the other on this thread.
    fn plain(rows: usize) -> Vec<(Cursor, Step)> {
        let (mut maker, mut at, mut steps) = (loader(rows).maker, Cursor::default(), Vec::new());
        while at.epoch < 2 {
            let step = maker.step(at).unwrap();
            steps.push((at, step.clone()));
            at = step.next;
        }
        steps
    }

    #[test]
    fn steps_are_those_that_are_made_one_by_one() {
        let plain = plain(23);
        assert_eq!(plain.len(), 8, "four steps an epoch, the last of them smaller");
        assert_eq!(plain[3].1.batches.iter().map(|laid| laid.examples.len()).collect::<Vec<_>>(), [2, 2, 1]);
        let mut running = loader(23);
        for (at, step) in &plain {
            assert_eq!(running.step_at(*at).unwrap(), *step);
        }
        // From any place, in any order: what was made ahead does not count.
        for (at, step) in plain.iter().rev().chain(&plain) {
            assert_eq!(running.step_at(*at).unwrap(), *step);
        }
    }

    #[test]
    fn shares_of_a_step_make_the_whole_of_it() {
        for world in [2, 3, 4] {
            let lengths = || (0..23).map(|i| 1 + i % 3).collect();
            let mut loaders: Vec<Loader> = (0..world).map(|rank| shared(23, Share::of(rank, world, lengths))).collect();
            for (at, whole) in plain(23) {
                let mut parts = Vec::new();
                for loader in &mut loaders {
                    let part = loader.step_at(at).unwrap();
                    assert_eq!(part.next, whole.next);
                    parts.extend(part.numbers.into_iter().zip(part.batches));
                }
                parts.sort_by_key(|(number, _)| *number);
                assert_eq!(parts.iter().map(|(number, _)| *number).collect::<Vec<_>>(), whole.numbers);
                assert!(parts.into_iter().map(|(_, batch)| batch).eq(whole.batches), "{world}");
            }
        }
    }

    #[test]
    fn a_fault_comes_with_its_step() {
        // The plan has more rows than there are examples, so one of an epoch's steps cannot be made.
        let mut running = loader(24);
        let mut at = Cursor::default();
        let mut steps = 0;
        let error = loop {
            match running.step_at(at) {
                Ok(step) => (at, steps) = (step.next, steps + 1),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("23") && steps < 4, "{steps} steps, then {error}");
        assert_eq!(
            running.step_at(at).unwrap_err().to_string(),
            error.to_string(),
            "and again when it is asked for again"
        );
    }
}
