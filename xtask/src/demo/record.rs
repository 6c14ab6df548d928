//! What the adapter learns: a record of a place, and the sentences that say the same.

use std::collections::BTreeSet;

use serde::Serialize;

use super::place::{Place, articles};
use super::rng::Rng;

/// A line of a dataset in the format `prompt_completion`.
#[derive(Serialize)]
pub struct Example {
    pub prompt: String,
    pub completion: String,
    /// The values of the record, each of which the completion names; in the test file only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slots: Vec<String>,
}

/// The fields beside the name, by their word in a record. The kind is always there.
const FIELDS: [&str; 7] = ["type", "food", "price", "area", "near", "open", "mood"];

/// `count` examples, all different.
pub fn examples(seed: u64, count: usize, held_out: bool) -> Vec<Example> {
    let mut rng = Rng::new(seed);
    let mut seen = BTreeSet::new();
    let mut examples = Vec::new();
    while examples.len() < count {
        let example = example(&mut rng, held_out);
        if seen.insert(example.prompt.clone()) {
            examples.push(example);
        }
    }
    examples
}

fn example(rng: &mut Rng, held_out: bool) -> Example {
    let place = Place::draw(rng, held_out);
    let mut fields: Vec<&str> = FIELDS.into_iter().filter(|field| *field == "type" || rng.chance(75)).collect();
    rng.shuffle(&mut fields);
    let mut prompt = format!("name: {}", place.name);
    let mut slots = vec![place.name.clone()];
    for field in &fields {
        let value = value(&place, field);
        prompt.push_str(&format!(" | {field}: {value}"));
        slots.push(value.to_owned());
    }
    prompt.push('\n');
    Example { prompt, completion: sentences(&place, &fields), slots }
}

fn value<'a>(place: &'a Place, field: &str) -> &'a str {
    match field {
        "food" => place.food,
        "price" => place.price,
        "area" => place.area,
        "near" => &place.near,
        "open" => place.hours,
        "mood" => place.mood,
        _ => place.kind,
    }
}

/// The sentences for a record. Which fields it has decides how they are put; their order in the record does not.
fn sentences(place: &Place, fields: &[&str]) -> String {
    let has = |field| fields.contains(&field);
    let mut text = String::from(match (has("food"), has("price")) {
        (true, true) => "For {price} {food} food, try {name}, {an} {kind}",
        (true, false) => "{name} is {an} {food} {kind}",
        (false, true) => "{name} is {an} {price} {kind}",
        (false, false) => "{name} is {an} {kind}",
    });
    text.push_str(match (has("area"), has("near")) {
        (true, true) => " in the {area}, near {near}",
        (true, false) => " in the {area}",
        (false, true) => " near {near}",
        (false, false) => "",
    });
    text.push_str(match (has("open"), has("mood")) {
        (true, true) => ". It is open {hours}, and guests call it {mood}.",
        (true, false) => ". It is open {hours}.",
        (false, true) => ". Guests call it {mood}.",
        (false, false) => ".",
    });
    articles(&place.fill(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_occurs_in_the_completion() {
        for held_out in [false, true] {
            for example in examples(5, 400, held_out) {
                assert!(example.slots.len() >= 2);
                for slot in &example.slots {
                    assert!(example.completion.contains(slot), "{slot}: {}", example.completion);
                    assert!(example.prompt.contains(&format!(": {slot}")), "{slot}: {}", example.prompt);
                }
                assert!(example.prompt.ends_with('\n') && !example.completion.contains('{'));
            }
        }
    }

    #[test]
    fn held_out_records_share_no_name_with_the_others() {
        let names = |held_out| -> BTreeSet<String> {
            examples(7, 400, held_out).into_iter().map(|example| example.slots[0].clone()).collect()
        };
        assert!(names(true).is_disjoint(&names(false)));
    }
}
