/**
 * Finds the members of a JSON object in its text, as they stand there. The digest of a request's
 * output is over the bytes of its chunks, and a number may have more digits than JavaScript
 * keeps, so what was parsed and written again will not do. No dependencies; runs in browsers.
 */

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const COMMA = 0x2c;
const COLON = 0x3a;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;

/**
 * The members of an object, each with everything between its colon and the comma or brace after
 * it, white space included. Of members with the same name the last one counts.
 * @param {string} text Well-formed JSON: it was parsed before.
 * @returns {Map<string, string>} Empty when it is no object.
 */
export function rawMembers(text) {
  const members = new Map();
  let at = text.search(/\S/);
  if (text.charCodeAt(at) !== OPEN_BRACE) return members;
  at = text.indexOf('"', at + 1);
  while (at >= 0) {
    const nameEnd = stringEnd(text, at);
    const name = JSON.parse(text.slice(at, nameEnd));
    at = nameEnd;
    while (text.charCodeAt(at) !== COLON) at += 1;
    const end = valueEnd(text, at + 1);
    members.set(name, text.slice(at + 1, end));
    at = text.charCodeAt(end) === COMMA ? text.indexOf('"', end) : -1;
  }
  return members;
}

/**
 * The elements of an array, each as it stands.
 * @param {string} text Well-formed JSON: it was parsed before.
 * @returns {string[]} Empty when it is no array.
 */
export function rawElements(text) {
  const elements = /** @type {string[]} */ ([]);
  let at = text.search(/\S/);
  if (text.charCodeAt(at) !== OPEN_BRACKET || /^\s*\[\s*\]\s*$/.test(text)) return elements;
  do {
    const end = valueEnd(text, at + 1);
    elements.push(text.slice(at + 1, end));
    at = end;
  } while (text.charCodeAt(at) === COMMA);
  return elements;
}

/**
 * @param {string} text
 * @param {number} at Where a string's opening quote is.
 * @returns {number} Just after its closing quote.
 */
function stringEnd(text, at) {
  for (let end = at + 1; end < text.length; end += 1) {
    const code = text.charCodeAt(end);
    if (code === BACKSLASH) end += 1;
    else if (code === QUOTE) return end + 1;
  }
  return text.length;
}

/**
 * @param {string} text
 * @param {number} at Where a value begins.
 * @returns {number} Where the comma, brace or bracket after it is.
 */
function valueEnd(text, at) {
  let depth = 0;
  for (let end = at; end < text.length; end += 1) {
    const code = text.charCodeAt(end);
    if (code === QUOTE) {
      end = stringEnd(text, end) - 1;
    } else if (code === OPEN_BRACE || code === OPEN_BRACKET) {
      depth += 1;
    } else if (code === CLOSE_BRACE || code === CLOSE_BRACKET) {
      if (depth === 0) return end;
      depth -= 1;
    } else if (code === COMMA && depth === 0) {
      return end;
    }
  }
  return text.length;
}
