//! A place to eat in the invented town.

use super::rng::Rng;
use super::words::{
    AREAS, FOODS, HOURS, KINDS, LANDMARK_FIRST, LANDMARK_SECOND, MOODS, NAME_FIRST, NAME_SECOND, PRICES,
};

pub struct Place {
    pub name: String,
    pub kind: &'static str,
    pub food: &'static str,
    pub price: &'static str,
    pub area: &'static str,
    pub near: String,
    pub hours: &'static str,
    pub mood: &'static str,
}

/// Whether places with this name are kept for evaluation: one name in eight, whose two words each occur in other names.
pub fn is_held_out(first: usize, second: usize) -> bool {
    (first + 3 * second).is_multiple_of(8)
}

impl Place {
    /// A place whose name is, or is not, one of those kept for evaluation.
    pub fn draw(rng: &mut Rng, held_out: bool) -> Self {
        let (first, second) = loop {
            let (first, second) = (rng.below(NAME_FIRST.len()), rng.below(NAME_SECOND.len()));
            if is_held_out(first, second) == held_out {
                break (first, second);
            }
        };
        Self {
            name: format!("The {} {}", NAME_FIRST[first], NAME_SECOND[second]),
            kind: rng.pick(&KINDS),
            food: rng.pick(&FOODS),
            price: rng.pick(&PRICES),
            area: rng.pick(&AREAS),
            near: format!("the {} {}", rng.pick(&LANDMARK_FIRST), rng.pick(&LANDMARK_SECOND)),
            hours: rng.pick(&HOURS),
            mood: rng.pick(&MOODS),
        }
    }

    /// Puts the place's values for `{name}`, `{kind}`, `{food}`, `{price}`, `{area}`, `{near}`, `{hours}` and `{mood}`.
    pub fn fill(&self, template: &str) -> String {
        let values: [(&str, &str); 8] = [
            ("{name}", &self.name),
            ("{kind}", self.kind),
            ("{food}", self.food),
            ("{price}", self.price),
            ("{area}", self.area),
            ("{near}", &self.near),
            ("{hours}", self.hours),
            ("{mood}", self.mood),
        ];
        values.iter().fold(template.to_owned(), |text, (mark, value)| text.replace(mark, value))
    }
}

/// Writes `a` or `an` for `{an}`, as the next word asks.
pub fn articles(text: &str) -> String {
    let mut parts = text.split("{an} ");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let vowel = part.starts_with(['a', 'e', 'i', 'o', 'A', 'E', 'I', 'O']);
        out.push_str(if vowel { "an " } else { "a " });
        out.push_str(part);
    }
    out
}

/// The first letter as a capital.
pub fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_to_their_side() {
        let mut rng = Rng::new(1);
        for held_out in [false, true] {
            for _ in 0..500 {
                let name = Place::draw(&mut rng, held_out).name;
                let words: Vec<_> = name.split(' ').collect();
                let at = |list: &[&str], word| list.iter().position(|w| *w == word).unwrap();
                assert_eq!(is_held_out(at(&NAME_FIRST, words[1]), at(&NAME_SECOND, words[2])), held_out, "{name}");
            }
        }
    }

    #[test]
    fn articles_follow_the_next_word() {
        assert_eq!(articles("{an} inn and {an} pub, {an} expensive one"), "an inn and a pub, an expensive one");
    }

    #[test]
    fn no_mark_is_left_over() {
        let place = Place::draw(&mut Rng::new(2), false);
        let text = place.fill("{name} {kind} {food} {price} {area} {near} {hours} {mood}");
        assert!(!text.contains('{') && text.starts_with("The "), "{text}");
    }
}
