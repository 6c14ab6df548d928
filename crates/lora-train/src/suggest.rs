//! The nearest known name to one that is not known.

/// The candidate that is most likely meant by `word`: the one with the fewest edits (insertions, deletions, swaps of
/// neighbours), if that is at most a third of the word's length. Ties go to the candidate that comes first.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let limit = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(edits, _)| *edits <= limit)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_found_and_a_different_word_is_not() {
        let names = ["learning_rate", "lora_alpha", "lora_dropout", "r"];
        assert_eq!(nearest("learing_rate", names), Some("learning_rate"));
        assert_eq!(nearest("lora_alhpa", names), Some("lora_alpha"));
        assert_eq!(nearest("Lora_Dropuot", names), Some("lora_dropout"));
        assert_eq!(nearest("temperature", names), None);
        assert_eq!(nearest("", []), None);
    }
}
