// Parts of two texts, each in words: the same in both, or what each has in place of the other. By the longest common subsequence.
const difference = (first, second) => {
  const common = Array.from({ length: first.length + 1 }, () => new Uint16Array(second.length + 1));
  for (let a = first.length - 1; a >= 0; a -= 1) {
    for (let b = second.length - 1; b >= 0; b -= 1) {
      common[a][b] = first[a] === second[b] ? common[a + 1][b + 1] + 1 : Math.max(common[a + 1][b], common[a][b + 1]);
    }
  }
  const parts = [];
  let [a, b] = [0, 0];
  while (a < first.length || b < second.length) {
    const same = a < first.length && b < second.length && first[a] === second[b];
    if (parts.at(-1)?.same !== same) parts.push({ same, first: "", second: "" });
    const part = parts.at(-1);
    const takesFirst = same || b === second.length || (a < first.length && common[a + 1][b] >= common[a][b + 1]);
    if (takesFirst) part.first += first[a++];
    if (same || !takesFirst) part.second += second[b++];
  }
  return parts;
};
