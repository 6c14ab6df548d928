//! The page and the figures: complete, self-contained, and inert whatever the data says.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{build, tokenizer};
use lora_data::{DataFigures, DataOptions, Dataset, PageRow, PreviewToken, StatsText, data_page, preview};
use proptest::prelude::*;
use serde_json::json;

const EVIL: &str = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><!-- &lt; \u{202e}evil\u{7}";

fn lengths(set: &Dataset) -> Vec<usize> {
    set.examples.iter().map(|example| example.input_ids.len()).collect()
}

fn page_of(text: &str) -> String {
    let t = tokenizer();
    let record = json!({"prompt": text, "completion": text, "<b>column</b>": 1});
    let set = build(&record.to_string(), &t, &DataOptions::default()).unwrap();
    let figures = DataFigures::of(&lengths(&set), 64, 4);
    let tokens = preview(&set.examples[0], &t).unwrap();
    data_page(text, &set.report, &figures, &[PageRow { origin: text.to_owned(), tokens }], 1)
}

/// Everything between `<` and `>`: the page's own tags and nothing of the data's.
fn tags(page: &str) -> Vec<&str> {
    page.split('<').skip(1).map(|rest| rest.split('>').next().unwrap()).collect()
}

fn assert_inert(page: &str) {
    let known = [
        "!doctype", "html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "table", "tr", "td", "svg",
        "rect", "text", "line", "p", "span", "strong", "b", "i", "u",
    ];
    for tag in tags(page) {
        let name = tag.trim_start_matches('/').split_whitespace().next().unwrap_or_default();
        assert!(known.contains(&name), "<{tag}>");
        assert!(
            !tag.contains("on") || ["content", "columns", "icon"].iter().any(|w| tag.contains(w)) || name != "img",
            "<{tag}>"
        );
        for request in ["src=", "href=", "url(", "@import", "onerror", "onload"] {
            assert!(!tag.contains(request), "<{tag}>");
        }
    }
    assert!(!page.contains("http:") && !page.contains("https:"));
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn a_page_says_what_evil_data_says_and_does_nothing() {
    let page = page_of(EVIL);
    assert_inert(&page);
    assert!(page.contains("⟨U+202E⟩") && page.contains("⟨U+0007⟩"));
    assert!(page.contains("&lt;b&gt;column&lt;/b&gt;"));
    let text = page.split("class=t>").last().unwrap();
    assert!(text.contains("<b") && text.contains("<i"));
}

#[test]
fn large_pages_are_limited() {
    let t = tokenizer();
    let set = build(&json!({"text": "ab"}).to_string(), &t, &DataOptions::default()).unwrap();
    let figures = DataFigures::of(&lengths(&set), 64, 4);
    let token = PreviewToken { id: 7, text: "word ".into(), trained: true, special: false };
    let rows: Vec<PageRow> =
        (0..5000).map(|i| PageRow { origin: format!("row {i}"), tokens: vec![token.clone(); 1000] }).collect();
    let page = data_page("many", &set.report, &figures, &rows, 5000);
    assert!(page.contains("200 of 5000 rows") && page.len() < 20_000_000, "{}", page.len());
    let long = [PageRow { origin: "long".into(), tokens: vec![token; 100_000] }];
    let page = data_page("long", &set.report, &figures, &long, 1);
    assert!(page.contains("the first 4000 are shown") && page.matches("title=7").count() == 4000);
}

#[test]
fn figures_add_up_and_the_histogram_fits() {
    let t = tokenizer();
    let lines: String = (1..200).map(|n| json!({"text": "0 ".repeat(n % 37 + 1)}).to_string() + "\n").collect();
    let set = build(&lines, &t, &DataOptions::default()).unwrap();
    let figures = DataFigures::of(&lengths(&set), 128, 8);
    assert_eq!(figures.lengths.iter().map(|bar| bar.examples).sum::<usize>(), set.examples.len());
    assert!(figures.lengths.windows(2).all(|pair| pair[0].to + 1 == pair[1].from));
    let packing = &figures.packing;
    assert_eq!(packing.rows * 128, set.report.tokens + packing.empty);
    assert!(figures.padding.grouped < figures.padding.shuffled, "{:?}", figures.padding);
    for width in [40, 80, 200] {
        let text = StatsText { report: &set.report, figures: &figures, width }.to_string();
        let bars: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("lengths")).skip(1).collect();
        assert_eq!(bars.len(), figures.lengths.len());
        assert!(bars.iter().all(|line| line.chars().count() <= width.max(44)), "{text}");
        assert!(text.contains("end token") && text.contains("duplicates") && text.contains("% filled"), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_text_is_inert(text in "(\\PC|<|>|&|\"|'|script|</b>|\n){1,40}") {
        assert_inert(&page_of(&text));
    }
}
