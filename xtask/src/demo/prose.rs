//! The text that the base model learns from: small pieces of prose about places to eat, none of them a record.
//!
//! What is said once returns later in the same piece, in other words, since a model that is to write about a place must
//! have learnt to look back and copy.

use super::place::{Place, articles, capital};
use super::rng::Rng;
use super::words::PEOPLE;

/// One piece of text.
pub fn piece(rng: &mut Rng) -> String {
    let text = match rng.below(16) {
        0..=7 => portrait(rng),
        8 | 9 => questions(rng),
        10 | 11 => comparison(rng),
        12 => talk(rng),
        13 => story(rng),
        _ => lists(rng),
    };
    articles(&text)
}

fn place(rng: &mut Rng) -> Place {
    Place::draw(rng, false)
}

/// Two people.
struct Cast {
    first: (&'static str, &'static str),
    second: (&'static str, &'static str),
}

impl Cast {
    fn draw(rng: &mut Rng) -> Self {
        let first = rng.pick(&PEOPLE);
        loop {
            let second = rng.pick(&PEOPLE);
            if second != first {
                return Self { first, second };
            }
        }
    }

    /// Puts the people for `{p}` and `{q}`, and their pronouns for `{p.she}`, `{P.She}`, `{q.she}` and `{Q.She}`.
    fn fill(&self, template: &str) -> String {
        template
            .replace("{p}", self.first.0)
            .replace("{q}", self.second.0)
            .replace("{p.she}", self.first.1)
            .replace("{q.she}", self.second.1)
            .replace("{P.She}", &capital(self.first.1))
            .replace("{Q.She}", &capital(self.second.1))
    }
}

/// What can be said about a place, fact by fact; the first names it.
const FACTS: [&[&str]; 7] = [
    &["{name} is {an} {kind}.", "There is {an} {kind} called {name}.", "Let us talk about {name}, {an} {kind}."],
    &[
        "It serves {food} food.",
        "The cook makes {food} dishes.",
        "You can eat {food} food there.",
        "The food is {food}.",
    ],
    &["It is {price}.", "Most people find it {price}.", "As for the price, it is {price}."],
    &["You find it in the {area}.", "It lies in the {area}.", "It belongs to the {area}."],
    &["It stands near {near}.", "It is close to {near}.", "From there you can see {near}."],
    &["It is open {hours}.", "Its doors are open {hours}.", "You can go there {hours}."],
    &["Guests call it {mood}.", "It is {mood}.", "People say that it is {mood}."],
];

/// The same in few words.
const NOTES: [&[&str]; 7] = [
    &["{name}, {an} {kind}.", "A place called {name}: {an} {kind}.", "Now {name}, {an} {kind}."],
    &["Good for {food} food.", "Mostly {food} food.", "With {food} food."],
    &["Known as {price}.", "Called {price} by all."],
    &["In the {area}.", "Part of the {area}."],
    &["Near {near}.", "Not far from {near}."],
    &["Open {hours}.", "Best {hours}."],
    &["Often {mood}.", "Said to be {mood}."],
];

/// What may follow once the facts are known.
const RECALLS: [&str; 28] = [
    "So if you like {food} food, go to {name}.",
    "In short, {name} is {an} {price} {kind}.",
    "Whoever walks past {near} soon finds {name}.",
    "That is the {kind} in the {area}.",
    "This {price} {kind} near {near} is {mood}.",
    "When you stand at {near}, {name} is not far, and it is open {hours}.",
    "Nobody in the {area} forgets {name}.",
    "They have {food} food {hours}.",
    "Those who have been there say that it is {mood}.",
    "This {kind} in the {area} is {price}, and {mood} too.",
    "Eat {food} food {hours}, in the {area}, and look at {near}.",
    "It is {mood}, it is {price}, and its name is {name}.",
    "There is no better {food} food in the {area} than in this {kind}.",
    "Many a guest has come for {food} food.",
    "I went there because it is open {hours}, and I found it {mood}.",
    "The way to this {kind} leads past {near} in the {area}.",
    "So {name} is {an} {price} {kind} in the {area}, near {near}, with {food} food.",
    "It is {an} {kind} in the {area}, it is open {hours}, and it is {mood}.",
    "Who wants {food} food that is {price} goes to the {kind} near {near}.",
    "You can eat there {hours}, it is {price}, and it is {mood}.",
    "All the {area} is talking of {food} food.",
    "The {kind} near {near} is {mood} and open {hours}.",
    "What other {kind} has {food} food that is so {price}?",
    "A friend asked me for {food} food, and I named this {kind}.",
    "If {an} {kind} is {mood}, has {food} food and is open {hours}, what more do you want?",
    "The {food} cook of {name} is from the {area}.",
    "It is {an} {kind}, it is {price}, and it is for those who like {food} food.",
    "{name} is {an} {kind} for {food} food.",
];

/// The naming fact first, then `count` others; returned with what has been said.
fn facts(rng: &mut Rng, place: &Place, count: usize) -> (Vec<String>, String) {
    let list = if rng.chance(50) { FACTS } else { NOTES };
    let mut others: Vec<usize> = (1..list.len()).collect();
    rng.shuffle(&mut others);
    let chosen: Vec<&str> =
        std::iter::once(0).chain(others.into_iter().take(count)).map(|i| rng.pick(list[i])).collect();
    (chosen.iter().map(|template| place.fill(template)).collect(), chosen.concat())
}

/// Whether a template says nothing that has not been said.
fn is_known(template: &str, said: &str) -> bool {
    ["{kind}", "{food}", "{price}", "{area}", "{near}", "{hours}", "{mood}"]
        .iter()
        .all(|mark| !template.contains(mark) || said.contains(mark))
}

fn portrait(rng: &mut Rng) -> String {
    let place = place(rng);
    let count = 4 + rng.below(3);
    let (mut sentences, said) = facts(rng, &place, count);
    let mut recalls: Vec<&str> = RECALLS.into_iter().filter(|template| is_known(template, &said)).collect();
    rng.shuffle(&mut recalls);
    sentences.extend(recalls.iter().take(6).map(|template| place.fill(template)));
    sentences.join(" ")
}

/// Questions about a place, each with its answer.
const QUESTIONS: [[&str; 2]; 14] = [
    ["Where can I eat {food} food?", "At {name}."],
    ["What is the name of the {kind}?", "{name}."],
    ["What kind of place is it?", "{name} is {an} {kind}."],
    ["What food do they have?", "They have {food} food."],
    ["What do you eat at {name}?", "{food} food, of course."],
    ["What does it cost?", "It is {price}."],
    ["Is {name} cheap?", "I would say that it is {price}."],
    ["Where is it?", "In the {area}."],
    ["In which part of the town is {name}?", "{name} is in the {area}."],
    ["How do I find it?", "Look for {near}."],
    ["What is near {name}?", "It is near {near}."],
    ["When is it open?", "It is open {hours}."],
    ["When shall we go to {name}?", "Let us go {hours}."],
    ["What is {name} like?", "They call it {mood}."],
];

fn exchange(place: &Place, question: &[&str; 2], turn: usize) -> String {
    let says = match turn % 3 {
        0 => "\"{question}\" asked {p}. \"{answer}\" said {q}.",
        1 => "\"{question}\" \"{answer}\"",
        _ => "{p} asked: \"{question}\" And {q} said: \"{answer}\"",
    };
    let answer = match (turn % 3, question[1].strip_suffix('.')) {
        (0, Some(answer)) => format!("{answer},"),
        _ => question[1].to_owned(),
    };
    place.fill(&says.replace("{question}", question[0]).replace("{answer}", &answer))
}

/// Facts, and then questions about them.
fn questions(rng: &mut Rng) -> String {
    let (place, cast) = (place(rng), Cast::draw(rng));
    let count = 3 + rng.below(4);
    let (mut sentences, said) = facts(rng, &place, count);
    let mut asked: Vec<&[&str; 2]> = QUESTIONS.iter().filter(|pair| is_known(&pair.concat(), &said)).collect();
    rng.shuffle(&mut asked);
    let turn = rng.below(3);
    sentences.extend(asked.into_iter().take(5).map(|question| exchange(&place, question, turn)));
    cast.fill(&sentences.join(" "))
}

/// Two people talk; the facts come out, and are used.
fn talk(rng: &mut Rng) -> String {
    let (place, cast) = (place(rng), Cast::draw(rng));
    let opening = rng.pick(&[
        "\"Where shall we eat?\" asked {p}. \"At {name},\" said {q}. \"It is {an} {kind} in the {area}.\"",
        "{p} had never heard of {name}. \"It is {an} {kind} in the {area},\" said {q}.",
        "\"Meet me at {name},\" {q} wrote to {p}. \"It is the {kind} in the {area}.\"",
    ]);
    let mut middle = vec![
        "\"What food do they have?\" asked {p}. \"{food} food,\" said {q}.",
        "\"What does it cost?\" asked {p}. \"It is {price},\" said {q}.",
        "\"How do I find it?\" asked {p}. \"It is near {near},\" said {q}.",
        "\"When is it open?\" asked {p}. \"It is open {hours},\" said {q}.",
        "\"What is it like?\" asked {p}. \"I find it {mood},\" said {q}.",
    ];
    rng.shuffle(&mut middle);
    let mut endings = vec![
        "So {p} and {q} had {food} food at {name}.",
        "So {p.she} went to {near} and looked for {name}.",
        "{p} told everybody about {name}: {an} {kind} in the {area}, open {hours}.",
        "\"{name} is {mood}, and it is {price},\" said {p} on the way home.",
        "{P.She} liked the {food} food, and that {name} was {price}.",
        "Now {p.she} knows the {area}, and {near} too.",
    ];
    rng.shuffle(&mut endings);
    let parts: Vec<&str> = std::iter::once(opening).chain(middle).chain(endings.into_iter().take(3)).collect();
    cast.fill(&place.fill(&parts.join(" ")))
}

/// Several places, and who chose which.
fn comparison(rng: &mut Rng) -> String {
    let cast = Cast::draw(rng);
    let places: Vec<Place> = (0..2 + rng.below(2)).map(|_| place(rng)).collect();
    let introduction = [
        "{name} is {an} {kind} in the {area} and serves {food} food. It is {price}, and it stands near {near}.",
        "There is also {name}, {an} {price} {kind} near {near}. You find it in the {area}, and the food is {food}.",
        "Then there is {name}, which is {price}. It is {an} {kind} with {food} food near {near}, in the {area}.",
    ];
    let mut sentences: Vec<String> = places.iter().zip(introduction).map(|(place, text)| place.fill(text)).collect();
    let mut choices = vec![
        "{p} wanted {food} food, so {p.she} went to {name}.",
        "{q} came from {near} and took the first {kind}, which was {name}.",
        "Who lives in the {area} goes to {name}.",
        "To those who look for something {price}, {q} names {name}.",
        "{name} is the one near {near}.",
        "{name} is the one with {food} food.",
        "The {kind} is called {name}, and it is {price}.",
        "At {name}, in the {area}, {p} had {food} food.",
    ];
    rng.shuffle(&mut choices);
    sentences.extend(choices.into_iter().take(5).map(|text| {
        let chosen = rng.below(places.len());
        places[chosen].fill(text)
    }));
    cast.fill(&sentences.join(" "))
}

fn story(rng: &mut Rng) -> String {
    let (place, cast) = (place(rng), Cast::draw(rng));
    let parts = [
        rng.pick(&[
            "{p} was hungry. {P.She} walked through the {area} until {p.she} came to {near}.",
            "One day {p} got lost in the {area}. {P.She} stopped at {near} and looked around.",
            "It rained in the {area}, and {p} ran from {near} to the next open door.",
        ]),
        rng.pick(&[
            "Over a door hung a sign: {name}. It was {an} {kind}.",
            "There was {an} {kind}, and its name was {name}.",
            "{P.She} saw {an} {kind} that was called {name}.",
        ]),
        rng.pick(&[
            "The cook of {name} made {food} food, and it was {price}.",
            "They had {food} food. \"Is it cheap?\" {p.she} asked. \"It is {price},\" said the cook.",
            "On the table stood {food} food, and at {name} that is {price}.",
        ]),
        rng.pick(&[
            "{P.She} thought that the place was {mood}.",
            "\"This is {mood},\" {p.she} said.",
            "It was {mood} inside, and {p.she} stayed for a long time.",
        ]),
        rng.pick(&[
            "The next day {p} met {q}. \"Yesterday I had {food} food at {name},\" {p.she} said.",
            "Later {p} wrote to {q}: \"Go to {name} and eat the {food} food.\"",
            "{p} told {q} about {name}, about the {food} food, and about the cook.",
        ]),
        rng.pick(&[
            "\"Where is it?\" asked {q}. \"In the {area}, near {near}, and it is open {hours},\" said {p}.",
            "{q} asked where that was. \"Near {near}, in the {area}. They are open {hours},\" said {p}.",
            "So {q} went to the {area} too, found {near}, and ate at {name}, which is open {hours}.",
        ]),
        rng.pick(&[
            "And {q} also found {name} {mood}.",
            "Since then {name} has been their {kind}, open {hours}.",
            "\"{name}, {an} {price} {kind},\" said {q}, \"and {mood}.\"",
        ]),
    ];
    cast.fill(&place.fill(&parts.join(" ")))
}

/// Lists that are read out again, and in another order.
fn lists(rng: &mut Rng) -> String {
    let cast = Cast::draw(rng);
    let list: Vec<Place> = (0..3).map(|_| place(rng)).collect();
    let items = |mark: &str, order: [usize; 3]| {
        let [a, b, c] = order.map(|i| list[i].fill(mark));
        format!("{a}, {b} and {c}")
    };
    let (mark, subject) = rng.pick(&[
        ("{name}", "names of the town"),
        ("{name} near {near}", "places of the town"),
        ("{name} in the {area}", "places of the town"),
        ("{an} {kind} for {food} food", "things that were missing"),
        ("{an} {price} {kind}", "things to look for"),
        ("{near}", "sights of the town"),
    ]);
    let mut order = [0, 1, 2];
    let said = items(mark, order);
    let read = rng.pick(&["Then {q} read them out", "\"So there are three,\" said {q}", "{Q.She} wrote them down"]);
    rng.shuffle(&mut order);
    let mut text = format!(
        "{{p}} told {{q}} three {subject}: {said}. {read}: {said}. In another order they are {}.",
        items(mark, order)
    );
    let third = list[2].fill(mark);
    text.push_str(
        &rng.pick(&[" The last was {}.", " {p} liked the last one best: {}.", " And the last? It was {}."])
            .replace("{}", &third),
    );
    cast.fill(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::place::is_held_out;
    use crate::demo::words::{NAME_FIRST, NAME_SECOND};

    fn pieces(count: usize) -> Vec<String> {
        let mut rng = Rng::new(11);
        (0..count).map(|_| piece(&mut rng)).collect()
    }

    #[test]
    fn prose_is_whole_and_no_record() {
        for text in pieces(2000) {
            assert!(!text.contains(['{', '}', '|', '\n']), "{text}");
            assert!(text.ends_with(['.', '"', '?']), "{text}");
            assert!(!text.contains("  ") && !text.contains(" ."), "{text}");
        }
    }

    #[test]
    fn no_held_out_name_is_met_before_its_time() {
        // A space ends each name, as one second word is the beginning of another.
        let text = pieces(3000).join(" ").replace([',', '.', ':', '?'], " ");
        for (i, first) in NAME_FIRST.iter().enumerate() {
            for (j, second) in NAME_SECOND.iter().enumerate().filter(|(j, _)| is_held_out(i, *j)) {
                assert!(!text.contains(&format!("The {first} {second} ")), "{first} {j} {second}");
            }
        }
    }
}
