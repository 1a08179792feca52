-- On a web page, a picture without a text of its own is read aloud by its caption: Quarto leaves `alt` empty otherwise.
function Image(img)
  if FORMAT:match 'html' and not img.attributes['fig-alt'] and #img.caption > 0 then
    img.attributes['fig-alt'] = pandoc.utils.stringify(img.caption)
  end
  return img
end
