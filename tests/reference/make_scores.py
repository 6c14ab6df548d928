"""Scores of written texts by sacrebleu and rouge_score: make_scores.py OUT.json

sacrebleu 2.6.0, rouge_score 0.1.2. Each case alone, all together, and all with their first reference only."""
import json, sys
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

CASES = [
    ("The cat sat on the mat.", ["The cat sat on the mat."]),
    ("The cat sat on the mat.", ["A cat was sitting on the mat.", "There is a cat on the mat ."]),
    ("the the the the the the the", ["The cat is on the mat.", "There is a cat on the mat."]),
    ("", ["Something was wanted here."]),
    ("Something came where nothing was wanted.", [""]),
    ("", [""]),
    ("   ", ["a"]),
    ("word", ["word"]),
    ("two words", ["two words"]),
    ("three short words", ["three short words", "other"]),
    ("completely different", ["nothing in common at all"]),
    ("Blue Spice is a coffee shop in the city centre .", ["A coffee shop in the city centre area called Blue Spice . ", "Blue Spice is a coffee shop in city centre . "]),
    ("The Vaults, a pub near Café Adriatic, costs £30.", ["The Vaults pub near Café Adriatic has a 5 star rating . Prices start at £ 30 ."]),
    ("It costs 3.50, or 1,000.25 in all; 5-6 of them.", ["It costs 3.50 or 1,000.25 in all: 5 - 6 of them."]),
    ("Well... is it, or isn't it?!", ["Well. Is it or isn't it?", "well is it or isn't it"]),
    ("He said \"no\" & left (at once) [sic] {so}.", ["He said &quot;no&quot; &amp; left (at once) [sic] {so}."]),
    ("x &lt; y &gt; z <skipped> end", ["x < y > z end"]),
    ("line one\nline two", ["line one line two"]),
    ("hyphen-\nated word", ["hyphenated word"]),
    ("tabs\tand\u00a0hard\u2003spaces \u001c here", ["tabs and hard spaces here"]),
    ("Größe, naïveté und Straße", ["größe naivete und strasse", "Größe, naïveté und Straße!"]),
    ("我 爱 北京。", ["我 爱 北京。", "我爱北京"]),
    ("我爱北京", ["我爱上海"]),
    ("Привет, мир", ["привет мир"]),
    ("emoji 😀 and 👩‍👩‍👧 stay", ["emoji 😀 and others stay"]),
    ("\u212a is Kelvin, İstanbul", ["k is kelvin, istanbul"]),
    ("a b c d e f", ["f e d c b a"]),
    ("a b c d e f g", ["a x b y c z d"]),
    ("a.b,c-d/e:f;g", ["a . b , c-d / e : f ; g"]),
    ("1.2.3,4 .5 6. 7,8- 9--1", ["1.2.3,4 .5 6 . 7,8 - 9 - - 1"]),
    ("repeat repeat repeat repeat", ["repeat repeat", "repeat repeat repeat"]),
    ("A much longer answer than was ever asked for, with many words that nobody wanted to read", ["A short answer"]),
    ("Short", ["A much longer answer than that was asked for, with many words"]),
    (" leading and trailing ", ["leading and trailing"]),
    ("under_score ^caret `tick` ~tilde |bar", ["under_score ^ caret ` tick ` ~ tilde | bar"]),
]

bleu, chrf = BLEU(), CHRF()
rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def scores(cases):
    most = max(len(refs) for _, refs in cases)
    texts = [text for text, _ in cases]
    # None says that a text has no further reference.
    streams = [[refs[i] if i < len(refs) else None for _, refs in cases] for i in range(most)]
    return {
        "bleu": bleu.corpus_score(texts, streams).score,
        "chrf": chrf.corpus_score(texts, streams).score,
        "rouge_l": sum(rouge.score_multi(refs, text)["rougeL"].fmeasure for text, refs in cases) / len(cases),
        "exact_match": sum(any(r.strip() == text.strip() for r in refs) for text, refs in cases) / len(cases),
    }


tokenize = Tokenizer13a()
out = {
    "cases": [
        {"text": text, "references": refs, "words": tokenize(text.rstrip()).split(), "scores": scores([(text, refs)])}
        for text, refs in CASES
    ],
    "all": scores(CASES),
    "first": scores([(text, refs[:1]) for text, refs in CASES]),
}
with open(sys.argv[1], "w", encoding="utf-8") as f:
    json.dump(out, f, ensure_ascii=True, indent=1)
    f.write("\n")
