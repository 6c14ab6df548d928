//! Filling rows with as many examples as fit.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Packs examples of the given lengths into rows of at most `max_length` tokens, best fit decreasing: the longest
/// first, each into the fullest row that still has room. Near-linear in time (`n log n`), and always the same.
///
/// Every example is in exactly one row; one that is longer than `max_length` has a row to itself. Rows are ordered by
/// their first example, examples of a row by their number.
pub fn pack(lengths: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&example| (std::cmp::Reverse(lengths[example]), example));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows that are not full, by the room they have left.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for example in order {
        let length = lengths[example];
        let (row, room) = match take_fullest(&mut open, length) {
            Some(found) => found,
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, max_length.max(length))
            }
        };
        rows[row].push(example);
        if room > length {
            open.entry(room - length).or_default().push(row);
        }
    }
    for row in &mut rows {
        row.sort_unstable();
    }
    rows.sort_unstable();
    rows
}

/// Takes out the row with the least room that still holds `length`.
fn take_fullest(open: &mut BTreeMap<usize, Vec<usize>>, length: usize) -> Option<(usize, usize)> {
    let (&room, rows) = open.range_mut(length..).next()?;
    let row = rows.pop()?;
    if rows.is_empty() {
        open.remove(&room);
    }
    Some((row, room))
}

/// Which examples make a row: one each, or as many as fit. A copy costs nothing.
#[derive(Debug, Clone)]
pub struct RowPlan(Members);

#[derive(Debug, Clone)]
enum Members {
    OneEach(usize),
    Packed(Arc<[Vec<usize>]>),
}

impl RowPlan {
    /// A row for each of so many examples.
    pub fn one_each(examples: usize) -> Self {
        Self(Members::OneEach(examples))
    }

    /// Rows of at most `max_length` tokens; see [`pack`].
    pub fn packed(lengths: &[usize], max_length: usize) -> Self {
        Self(Members::Packed(pack(lengths, max_length).into()))
    }

    /// The same for stages of so many examples each: no row has examples of two of them. With it, the rows of each stage.
    pub fn packed_stages(lengths: &[usize], stages: &[usize], max_length: usize) -> (Self, Vec<usize>) {
        let (mut rows, mut counts, mut start) = (Vec::new(), Vec::with_capacity(stages.len()), 0);
        for &stage in stages {
            let end = (start + stage).min(lengths.len());
            let own = pack(&lengths[start..end], max_length);
            counts.push(own.len());
            rows.extend(own.into_iter().map(|row| row.into_iter().map(|i| start + i).collect::<Vec<_>>()));
            start = end;
        }
        (Self(Members::Packed(rows.into())), counts)
    }

    /// So many rows of `each` examples that follow each other.
    pub fn groups(rows: usize, each: usize) -> Self {
        Self(Members::Packed((0..rows).map(|row| (row * each..(row + 1) * each).collect()).collect::<Vec<_>>().into()))
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Members::OneEach(examples) => *examples,
            Members::Packed(rows) => rows.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The examples of a row; none for a row that does not exist.
    pub fn members(&self, row: usize) -> impl Iterator<Item = usize> {
        let (alone, several): (Range<usize>, &[usize]) = match &self.0 {
            Members::OneEach(examples) if row < *examples => (row..row + 1, &[]),
            Members::OneEach(_) => (0..0, &[]),
            Members::Packed(rows) => (0..0, rows.get(row).map_or(&[], Vec::as_slice)),
        };
        alone.chain(several.iter().copied())
    }

    /// The tokens of every row, where examples have these lengths.
    pub fn lengths(&self, of: &[usize]) -> Vec<usize> {
        let length = |example: usize| of.get(example).copied().unwrap_or(0);
        (0..self.len()).map(|row| self.members(row).map(length).sum()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_rows_by_best_fit() {
        assert_eq!(pack(&[6, 4, 3, 7, 5, 5], 10), vec![vec![0, 1], vec![2, 3], vec![4, 5]]);
        assert_eq!(pack(&[12, 1, 0], 10), vec![vec![0], vec![1, 2]]);
        assert!(pack(&[], 10).is_empty());
    }

    #[test]
    fn a_plan_is_packed_or_one_each() {
        let lengths = [6, 4, 3, 7];
        let members = |plan: &RowPlan| (0..=plan.len()).map(|row| plan.members(row).collect()).collect::<Vec<Vec<_>>>();
        let (packed, alone) = (RowPlan::packed(&lengths, 10), RowPlan::one_each(4));
        assert_eq!(members(&packed), [vec![0, 1], vec![2, 3], vec![]]);
        assert_eq!(members(&alone), [vec![0], vec![1], vec![2], vec![3], vec![]]);
        let (staged, counts) = RowPlan::packed_stages(&lengths, &[3, 0, 1], 10);
        assert_eq!((members(&staged), counts), (vec![vec![0, 1], vec![2], vec![3], vec![]], vec![2, 0, 1]));
        assert_eq!((packed.lengths(&lengths), alone.lengths(&lengths)), (vec![10, 10], lengths.to_vec()));
    }
}
