//! Filling rows with as many examples as fit.

use std::collections::BTreeMap;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_rows_by_best_fit() {
        assert_eq!(pack(&[6, 4, 3, 7, 5, 5], 10), vec![vec![0, 1], vec![2, 3], vec![4, 5]]);
        assert_eq!(pack(&[12, 1, 0], 10), vec![vec![0], vec![1, 2]]);
        assert!(pack(&[], 10).is_empty());
    }
}
