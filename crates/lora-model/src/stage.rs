//! The part of a model that a process holds, where the whole is divided among several: consecutive blocks, with the tables
//! before the first of them and the head behind the last.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::names::modules;
use std::ops::Range;

/// Consecutive blocks of a model, with what is before or behind them where they are the first or the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    blocks: Range<usize>,
    /// Blocks of the whole model.
    of: usize,
}

impl Stage {
    /// All of a model.
    pub fn whole(config: &ModelConfig) -> Self {
        let of = config.windows.len();
        Self { blocks: 0..of, of }
    }

    /// Divides a model into `stages`, so that the one with the most weights has as few as can be. A tied table counts, and
    /// is held, at both ends.
    ///
    /// # Errors
    /// [`Error::Input`] for more stages than there are blocks, or none.
    pub fn split(config: &ModelConfig, stages: usize) -> Result<Vec<Self>> {
        let of = config.windows.len();
        if !(1..=of).contains(&stages) {
            let expected = format!("from 1 to the {of} blocks of the model");
            return Err(Error::Input { what: "stages", expected, got: stages.to_string() });
        }
        let (mut weights, mut head) = (vec![0u64; of + 1], 0);
        let whole = Self::whole(config);
        for module in modules(config) {
            let numbers: i64 = module.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
            match whole.place(config, &module.path) {
                Place::Before => weights[0] += numbers.unsigned_abs(),
                Place::Block(i) => weights[i + 1] += numbers.unsigned_abs(),
                Place::Behind => head += numbers.unsigned_abs(),
            }
        }
        // What comes before the blocks goes with the first of them, and the head with the last.
        weights[1] += weights.remove(0);
        weights[of - 1] += head;
        Ok(divide(&weights, stages).into_iter().map(|blocks| Self { blocks, of }).collect())
    }

    /// Its blocks, by their numbers in the whole model.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }

    /// Whether it holds what comes before the blocks.
    pub fn is_first(&self) -> bool {
        self.blocks.start == 0
    }

    /// Whether it holds the head.
    pub fn is_last(&self) -> bool {
        self.blocks.end == self.of
    }

    /// Whether it is the whole model.
    pub fn is_whole(&self) -> bool {
        self.is_first() && self.is_last()
    }

    /// Whether a module belongs to it.
    pub fn holds(&self, config: &ModelConfig, path: &str) -> bool {
        match self.place(config, path) {
            Place::Before => self.is_first(),
            Place::Block(i) => self.blocks.contains(&i),
            Place::Behind => self.is_last(),
        }
    }

    fn place(&self, config: &ModelConfig, path: &str) -> Place {
        let layout = config.layout;
        let number = path.strip_prefix(layout.layers).and_then(|rest| rest.strip_prefix('.'));
        let number = number.and_then(|rest| rest.split('.').next()?.parse().ok());
        let tables = [Some(layout.embed_tokens), layout.embed_positions, layout.embed_types, layout.embed_norm];
        match number {
            Some(i) => Place::Block(i),
            None if tables.contains(&Some(path)) => Place::Before,
            None => Place::Behind,
        }
    }
}

enum Place {
    Before,
    Block(usize),
    Behind,
}

/// Consecutive parts of `weights`, none empty, of which the heaviest is as light as can be; of several such the one whose
/// early parts are the longest.
fn divide(weights: &[u64], parts: usize) -> Vec<Range<usize>> {
    let n = weights.len();
    let sum = |range: Range<usize>| weights[range].iter().sum::<u64>();
    // The lightest heaviest part of those from `i` on, and where the first of them ends.
    let mut best: Vec<(u64, usize)> = (0..n).map(|i| (sum(i..n), n)).collect();
    let mut ends = vec![best.clone()];
    for more in 1..parts {
        best = (0..n)
            .map(|i| {
                let last = n.saturating_sub(more);
                let options = (i + 1..=last).rev().map(|end| (sum(i..end).max(best[end].0), end));
                options.min_by_key(|(heaviest, _)| *heaviest).unwrap_or((u64::MAX, n))
            })
            .collect();
        ends.push(best.clone());
    }
    let mut start = 0;
    let bounds = ends.iter().rev().map(|best| {
        let range = start..best[start].1;
        start = range.end;
        range
    });
    bounds.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    #[test]
    fn a_model_is_divided_by_its_weights() {
        assert_eq!(divide(&[1, 1, 1, 1], 2), [0..2, 2..4]);
        // The head of a small model weighs as much as many blocks.
        assert_eq!(divide(&[1, 1, 1, 9], 2), [0..3, 3..4]);
        assert_eq!(divide(&[9, 1, 1, 1], 3), [0..1, 1..3, 3..4]);
        assert_eq!(divide(&[5], 1).first(), Some(&(0..1)));
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
        let config = ModelConfig::read(&dir).unwrap();
        let stages = Stage::split(&config, 2).unwrap();
        assert_eq!(stages.iter().map(Stage::blocks).collect::<Vec<_>>(), [0..1, 1..2]);
        for module in modules(&config) {
            let holders = stages.iter().filter(|stage| stage.holds(&config, &module.path)).count();
            assert_eq!(holders, 1, "{}", module.path);
        }
        assert!(stages[0].holds(&config, "model.embed_tokens") && stages[1].holds(&config, "model.norm"));
        assert!(Stage::whole(&config).is_whole() && !stages[0].is_whole());
        for stages in [0, 3] {
            let error = Stage::split(&config, stages).unwrap_err().to_string();
            assert!(error.contains("from 1 to the 2 blocks"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_other_division_has_a_lighter_heaviest_part(
            weights in prop::collection::vec(1u64..20, 1..9),
            parts in 1usize..6,
        ) {
            let parts = parts.min(weights.len());
            let heaviest = |ranges: &[Range<usize>]| {
                ranges.iter().map(|range| weights[range.clone()].iter().sum::<u64>()).max().unwrap_or(0)
            };
            let own = divide(&weights, parts);
            prop_assert!(own.len() == parts && own.iter().all(|range| !range.is_empty()));
            prop_assert!(own.iter().flat_map(Clone::clone).eq(0..weights.len()));
            // Every division, by the set of places where a part ends.
            for cuts in 0u32..1 << (weights.len() - 1) {
                if cuts.count_ones() as usize + 1 != parts {
                    continue;
                }
                let mut ranges = Vec::new();
                let mut start = 0;
                for i in 1..=weights.len() {
                    if i == weights.len() || cuts >> (i - 1) & 1 == 1 {
                        ranges.push(start..i);
                        start = i;
                    }
                }
                prop_assert!(heaviest(&own) <= heaviest(&ranges), "{:?} and not {:?}", own, ranges);
            }
        }
    }
}
