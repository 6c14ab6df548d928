//! Packing, batches and order: nothing lost, nothing twice, and always the same.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use lora_data::{Batch, Cursor, Example, Origin, Sampler, epoch_order, grouped_order, pack};
use proptest::prelude::*;

fn examples() -> impl Strategy<Value = Vec<Example>> {
    let row = prop::collection::vec((0..1000_u32, any::<bool>()), 0..40);
    prop::collection::vec(row, 0..20).prop_map(|rows| {
        let example = |row: Vec<(u32, bool)>| {
            let (input_ids, mut trained): (Vec<u32>, Vec<bool>) = row.into_iter().unzip();
            if let Some(first) = trained.first_mut() {
                *first = false;
            }
            Example { input_ids, trained, origin: Origin { file: Path::new("x").into(), record: 1, line: 1 } }
        };
        rows.into_iter().map(example).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn pack_keeps_everything_once(lengths in prop::collection::vec(0..70_usize, 0..300), max_length in 1..64_usize) {
        let rows = pack(&lengths, max_length);
        let mut all: Vec<usize> = rows.concat();
        all.sort_unstable();
        prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        for row in &rows {
            let sum: usize = row.iter().map(|&e| lengths[e]).sum();
            prop_assert!(!row.is_empty() && (sum <= max_length || row.len() == 1));
        }
        // No two rows that were opened can be merged into one: at most one is half empty or emptier.
        let sums: Vec<usize> = rows.iter().map(|row| row.iter().map(|&e| lengths[e]).sum()).collect();
        prop_assert!(sums.iter().filter(|&&sum| 2 * sum <= max_length).count() <= 1);
        prop_assert_eq!(pack(&lengths, max_length), rows);
    }

    #[test]
    fn a_packed_batch_is_the_concatenation_of_single_ones(examples in examples()) {
        let packed = Batch::from_examples(&examples);
        let mut joined = Batch::default();
        for example in &examples {
            let single = Batch::from_examples([example]);
            let start = joined.tokens() as i64;
            joined.input_ids.extend(&single.input_ids);
            joined.position_ids.extend(&single.position_ids);
            joined.segment_lens.extend(&single.segment_lens);
            joined.target_rows.extend(single.target_rows.iter().map(|row| row + start));
            joined.targets.extend(&single.targets);
        }
        prop_assert_eq!(&packed, &joined);
        let trained: usize = examples.iter().map(|e| e.trained.iter().filter(|&&t| t).count()).sum();
        prop_assert_eq!(packed.trained_tokens(), trained);
        prop_assert_eq!(packed.segment_lens.iter().sum::<i64>() as usize, packed.tokens());
        for (&row, &target) in packed.target_rows.iter().zip(&packed.targets) {
            prop_assert_eq!(packed.input_ids[row as usize + 1], target);
            prop_assert_eq!(packed.position_ids[row as usize + 1], packed.position_ids[row as usize] + 1);
        }
    }

    #[test]
    fn order_is_a_permutation_that_differs_by_epoch_and_seed(rows in 20..500_usize, seed: u64, epoch in 0..u64::MAX) {
        let order = epoch_order(rows, seed, epoch);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..rows).collect::<Vec<_>>());
        prop_assert_ne!(&order, &epoch_order(rows, seed, epoch + 1));
        prop_assert_ne!(&order, &epoch_order(rows, seed.wrapping_add(1), epoch));
    }

    #[test]
    fn batches_resume_anywhere(rows in 1..60_usize, n in 1..20_usize, seed: u64, shuffle: bool, calls in 1..30_usize) {
        let mut running = Sampler::new(rows, seed, shuffle);
        let mut cursor = Cursor::default();
        let mut epochs: Vec<Vec<usize>> = vec![Vec::new()];
        for _ in 0..calls {
            // A new sampler that knows nothing but the cursor goes on in the same way.
            let resumed = Sampler::new(rows, seed, shuffle).next_batch(cursor, n);
            let (batch, next) = running.next_batch(cursor, n);
            prop_assert_eq!(&resumed, &(batch.clone(), next));
            prop_assert!(!batch.is_empty() && batch.len() <= n && next > cursor);
            epochs.last_mut().unwrap().extend(batch);
            if next.epoch > cursor.epoch {
                epochs.push(Vec::new());
            }
            cursor = next;
        }
        for (epoch, seen) in epochs.iter().enumerate() {
            let order = if shuffle { epoch_order(rows, seed, epoch as u64) } else { (0..rows).collect() };
            prop_assert_eq!(&order[..seen.len()], &seen[..]);
        }
        prop_assert_eq!(running.batches_per_epoch(n), rows.div_ceil(n));
    }
}

/// Each place of a row in the order is equally likely: over 12,000 epochs of four rows, 24 orders come up 500 times each.
#[test]
fn every_order_is_equally_likely() {
    let mut counts = std::collections::BTreeMap::new();
    for epoch in 0..12_000 {
        *counts.entry(epoch_order(4, 42, epoch)).or_insert(0_u32) += 1;
    }
    assert_eq!(counts.len(), 24);
    let chi_squared: f64 = counts.values().map(|&n| (f64::from(n) - 500.0).powi(2) / 500.0).sum();
    // 23 degrees of freedom: above 49.7 once in a thousand seeds, and the seed is fixed.
    assert!(chi_squared < 49.7, "{chi_squared}");
}

#[test]
fn no_rows_give_no_batch() {
    let start = Cursor::default();
    assert_eq!(Sampler::new(0, 0, true).next_batch(start, 4), (Vec::new(), start));
    assert_eq!(Sampler::new(4, 0, true).next_batch(start, 0), (Vec::new(), start));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Grouping by length loses nothing, repeats nothing, resumes anywhere, and pads no more than chance does: sorted
    /// batches cost least, but for the one that is not full, which chance may fill with the longest rows.
    #[test]
    fn grouped_orders_are_permutations(lengths in prop::collection::vec(1..2000_usize, 0..500), batch in 1..17_usize, seed: u64, epoch in 0..u64::MAX) {
        let order = grouped_order(&lengths, batch, seed, epoch);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..lengths.len()).collect::<Vec<_>>());
        prop_assert_eq!(&order, &grouped_order(&lengths, batch, seed, epoch));
        let padded = |order: &[usize]| -> usize {
            order.chunks(batch).map(|rows| rows.len() * rows.iter().map(|&r| lengths[r]).max().unwrap()).sum()
        };
        let one_batch = batch * lengths.iter().max().copied().unwrap_or(0);
        prop_assert!(padded(&order) <= padded(&epoch_order(lengths.len(), seed, epoch)) + one_batch);
        if lengths.len() >= batch && lengths.len() <= 50 * batch {
            let longest = *lengths.iter().max().unwrap();
            prop_assert!(order[..batch].iter().any(|&row| lengths[row] == longest));
        }
        let mut sampler = Sampler::grouped(lengths.clone(), batch, seed);
        let mut cursor = Cursor { epoch: 3, row: 0 };
        let mut seen = Vec::new();
        while cursor.epoch == 3 && !lengths.is_empty() {
            let (rows, next) = Sampler::grouped(lengths.clone(), batch, seed).next_batch(cursor, batch);
            prop_assert_eq!((rows.clone(), next), sampler.next_batch(cursor, batch));
            seen.extend(rows);
            cursor = next;
        }
        if !lengths.is_empty() {
            prop_assert_eq!(seen, grouped_order(&lengths, batch, seed, 3));
        }
    }
}
