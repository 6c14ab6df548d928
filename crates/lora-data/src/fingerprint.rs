//! A short digest of a row: tells duplicates, and whether a stored row is what was written.

use crate::example::Example;

/// The first 128 bits of a BLAKE3 over tokens and mask: the same on every machine, and never the same for two rows that
/// differ.
pub(crate) type Fingerprint = [u8; 16];

/// Token ids are below this, so that an id and its place in the mask fit into one word of 32 bits.
pub(crate) const MAX_VOCABULARY: usize = 1 << 31;

impl Example {
    /// Tokens and mask as they are stored: for each token `2 * id + trained` in 32 bits, the lowest first.
    pub(crate) fn to_words(&self, out: &mut Vec<u8>) {
        out.reserve(4 * self.input_ids.len());
        for (id, trained) in self.input_ids.iter().zip(&self.trained) {
            out.extend_from_slice(&(id << 1 | u32::from(*trained)).to_le_bytes());
        }
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let mut words = Vec::new();
        self.to_words(&mut words);
        fingerprint_of(&words)
    }
}

/// The fingerprint of a row in its stored form.
pub(crate) fn fingerprint_of(words: &[u8]) -> Fingerprint {
    let digest = blake3::hash(words);
    std::array::from_fn(|at| digest.as_bytes()[at])
}

/// Tokens and mask from their stored form.
pub(crate) fn from_words(words: &[u8]) -> (Vec<u32>, Vec<bool>) {
    words
        .chunks_exact(4)
        .map(|word| {
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            (word >> 1, word & 1 == 1)
        })
        .unzip()
}
