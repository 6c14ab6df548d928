//! Rows of tokens, in memory or in a file that is mapped: what packing, order and batches are made from.

use std::sync::Arc;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::batch::Batch;
use crate::cache::TokenFile;
use crate::document::Origin;
use crate::error::{DataError, Result};
use crate::example::Example;
use crate::fingerprint::Fingerprint;

/// Rows of tokens in some order, each any number of times. A copy costs nothing: the tokens are shared.
#[derive(Debug, Clone)]
pub struct Rows {
    store: Arc<Store>,
    /// For each row its place in the store; as the store has them when absent.
    order: Option<Arc<[usize]>>,
}

#[derive(Debug)]
enum Store {
    Memory(Vec<Example>),
    File(TokenFile),
}

impl From<Vec<Example>> for Rows {
    fn from(examples: Vec<Example>) -> Self {
        Self { store: Arc::new(Store::Memory(examples)), order: None }
    }
}

impl From<TokenFile> for Rows {
    fn from(file: TokenFile) -> Self {
        Self { store: Arc::new(Store::File(file)), order: None }
    }
}

impl Rows {
    /// How many there are.
    pub fn len(&self) -> usize {
        match (&self.order, &*self.store) {
            (Some(order), _) => order.len(),
            (None, Store::Memory(examples)) => examples.len(),
            (None, Store::File(file)) => file.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of these rows, each as often as `order` names it.
    ///
    /// # Errors
    /// [`DataError::NoRow`] for a number that no row has.
    pub fn select(&self, order: Vec<usize>) -> Result<Self> {
        let places = order.into_iter().map(|row| self.place(row)).collect::<Result<Vec<_>>>()?;
        Ok(Self { store: self.store.clone(), order: Some(places.into()) })
    }

    fn place(&self, row: usize) -> Result<usize> {
        let rows = self.len();
        let place = match &self.order {
            Some(order) => order.get(row).copied(),
            None => Some(row).filter(|row| *row < rows),
        };
        place.ok_or(DataError::NoRow { row, rows })
    }

    /// A row: its tokens, its mask and where it comes from.
    ///
    /// # Errors
    /// [`DataError::NoRow`], or [`DataError::CacheDamaged`] where a file does not hold what was written into it.
    pub fn example(&self, row: usize) -> Result<Example> {
        let place = self.place(row)?;
        match &*self.store {
            Store::Memory(examples) => examples.get(place).cloned().ok_or(DataError::NoRow { row, rows: self.len() }),
            Store::File(file) => file.example(place),
        }
    }

    /// Some rows, laid end to end.
    ///
    /// # Errors
    /// As [`Rows::example`].
    pub fn batch(&self, rows: impl IntoIterator<Item = usize>) -> Result<Batch> {
        let examples = rows.into_iter().map(|row| self.example(row)).collect::<Result<Vec<_>>>()?;
        Ok(Batch::from_examples(&examples))
    }

    /// Where a row comes from.
    ///
    /// # Errors
    /// As [`Rows::example`].
    pub fn origin(&self, row: usize) -> Result<Origin> {
        let place = self.place(row)?;
        match &*self.store {
            Store::Memory(_) => Ok(self.example(row)?.origin),
            Store::File(file) => file.origin(place),
        }
    }

    /// The length of every row, in tokens.
    pub fn lengths(&self) -> Vec<usize> {
        match &*self.store {
            Store::Memory(examples) => self.each(|place| examples.get(place).map_or(0, |e| e.input_ids.len())),
            Store::File(file) => self.each(|place| file.length(place)),
        }
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.lengths().into_iter().sum()
    }

    /// All tokens that are trained.
    pub fn trained_tokens(&self) -> usize {
        let count = |example: &Example| example.trained.iter().filter(|trained| **trained).count();
        let counts: Vec<usize> = match &*self.store {
            Store::Memory(examples) => self.each(|place| examples.get(place).map_or(0, count)),
            Store::File(file) => self.each(|place| file.trained(place)),
        };
        counts.into_iter().sum()
    }

    /// The highest token of any row; none when there is no token.
    ///
    /// # Errors
    /// As [`Rows::example`].
    pub fn highest_token(&self) -> Result<Option<u32>> {
        match (&*self.store, &self.order) {
            (Store::File(file), None) => Ok(file.highest_token()),
            _ => {
                let highest = |row| Ok(self.example(row)?.input_ids.into_iter().max());
                (0..self.len()).try_fold(None, |most, row| Ok(most.max(highest(row)?)))
            }
        }
    }

    /// The sha256, in hexadecimal, of the number of rows and of every row's tokens and mask.
    pub fn digest(&self) -> String {
        let fingerprints: Vec<Fingerprint> = match &*self.store {
            Store::Memory(examples) => {
                let of = |place: usize| examples.get(place).map_or([0; 16], Example::fingerprint);
                (0..self.len()).into_par_iter().map(|row| of(self.place(row).unwrap_or(row))).collect()
            }
            Store::File(file) => self.each(|place| file.fingerprint(place)),
        };
        let mut hash = Sha256::new();
        hash.update((fingerprints.len() as u64).to_le_bytes());
        fingerprints.iter().for_each(|fingerprint| hash.update(fingerprint));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn each<T>(&self, of: impl Fn(usize) -> T) -> Vec<T> {
        match &self.order {
            Some(order) => order.iter().map(|&place| of(place)).collect(),
            None => (0..self.len()).map(of).collect(),
        }
    }
}
